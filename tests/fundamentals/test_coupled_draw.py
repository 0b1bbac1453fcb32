"""Tutorial: how a small model's guesses become exactly the large model's text, though both sample at random.

Read from top to bottom. A "model" here is any function from a prefix to logits; `target` is the large one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.protocol.messages import SEED_MAX, Sampling
from pilotfish.protocol.sampling import draw, gumbel, perturbed
from pilotfish.protocol.sampling_reference import law

VOCAB = 24
Logits = npt.NDArray[np.float32]
Model = Callable[[Sequence[int]], Logits]
Drafter = Callable[[Sequence[int], int], list[int]]


def model(name: int, sharpness: float = 2.0) -> Model:
    """A model with a mind of its own: its logits depend on the last three tokens."""

    def logits(prefix: Sequence[int]) -> Logits:
        rng = np.random.default_rng([name, len(prefix), *prefix[-3:]])
        return (rng.normal(size=VOCAB) * sharpness).astype(np.float32)

    return logits


def blend(one: Model, other: Model, share: float) -> Model:
    """A model that is `share` of the way from one to the other."""
    return lambda prefix: ((1 - share) * one(prefix) + share * other(prefix)).astype(np.float32)


def next_token(of: Model, prefix: Sequence[int], sampling: Sampling) -> int:
    """The one rule. The position of a token is its index in the sequence: the length of what stands before it."""
    return int(draw(of(prefix)[None], [len(prefix)], sampling)[0])


target = model(1)
PROMPT = [3, 1, 4, 1, 5]
WARM = Sampling(temperature=0.9, seed=42)


# --- 1. One rule -----------------------------------------------------------------------------------------------------


def test_a_token_is_the_argmax_of_logits_over_t_plus_noise() -> None:
    noise = gumbel(42, len(PROMPT), np.arange(VOCAB))
    assert next_token(target, PROMPT, WARM) == np.argmax(target(PROMPT) / np.float64(np.float32(0.9)) + noise)


def test_that_is_ordinary_sampling() -> None:
    """Over many seeds a token comes as often as softmax(logits / T) says (test_sampling_law.py is strict about it)."""
    counts = np.zeros(VOCAB)
    for seed in range(4000):
        counts[next_token(target, PROMPT, WARM.model_copy(update={"seed": seed}))] += 1
    assert np.abs(counts / 4000 - law(target(PROMPT).tolist(), WARM)).max() < 0.03


def test_the_noise_belongs_to_the_place_and_not_to_the_moment() -> None:
    """No generator, no state: any machine may draw any position, in any order, as often as it likes."""
    in_order = [gumbel(42, position, 7) for position in range(10)]
    assert [gumbel(42, position, 7) for position in reversed(range(10))] == in_order[::-1]
    assert len(set(map(float, in_order))) == 10


# --- 2. A draft is right iff it is the target's own draw -------------------------------------------------------------


def verify(prefix: Sequence[int], draft: Sequence[int], sampling: Sampling) -> list[int]:
    """What a cloud worker does, in one pass: the target's draw after each prefix of the draft, to the first surprise.

    The draws that equal the draft accept it; the one that does not corrects it; if all do, one more token is free.
    """
    draws: list[int] = []
    for guess in [*draft, None]:
        draws.append(next_token(target, [*prefix, *draws], sampling))
        if draws[-1] != guess:
            break
    return draws


def test_a_draft_equals_the_targets_draw_or_is_corrected() -> None:
    truth = verify(PROMPT, verify(PROMPT, [], WARM), WARM)  # two tokens, drawn by the target
    wrong = (truth[1] + 1) % VOCAB
    assert verify(PROMPT, truth, WARM)[:2] == truth  # accepted, and a third comes free
    assert verify(PROMPT, [truth[0], wrong, 9, 9], WARM) == truth  # accepted 1, corrected 1, the rest never mattered
    assert verify(PROMPT, [], WARM) == truth[:1]  # nothing drafted: the target draws alone


def test_no_probability_crosses_the_wire() -> None:
    """`verify` was given ids alone. Compare ordinary speculative decoding, which needs the drafter's distribution."""
    assert all(type(token) is int for token in verify(PROMPT, [1, 2, 3], WARM))


def test_a_job_may_be_verified_twice() -> None:
    """A worker died and its job is redelivered: the answer is the same, so at-least-once delivery is enough."""
    assert verify(PROMPT, [1, 2, 3], WARM) == verify(PROMPT, [1, 2, 3], WARM)


# --- 3. So the drafter changes the speed and never the text ----------------------------------------------------------


def generate(drafter: Drafter, lengths: Sequence[int], n_tokens: int, sampling: Sampling) -> tuple[list[int], int]:
    """Draft, verify, append, repeat; returns the text and the number of rounds to the cloud it took."""
    text, rounds = list(PROMPT), 0
    while len(text) < len(PROMPT) + n_tokens:
        draft = drafter(text, lengths[rounds % len(lengths)])
        text += verify(text, draft, sampling)
        rounds += 1
    return text[: len(PROMPT) + n_tokens], rounds


def drafting_with(small: Model, sampling: Sampling) -> Drafter:
    """The edge draws by the same rule with the same seed: the same noise at the same place."""

    def drafter(prefix: Sequence[int], length: int) -> list[int]:
        draft: list[int] = []
        for _ in range(length):
            draft.append(next_token(small, [*prefix, *draft], sampling))
        return draft

    return drafter


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 4]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, SEED_MAX),
)


@settings(max_examples=60, deadline=None)
@given(
    sampling=samplings,
    share=st.floats(0, 1),
    other=st.integers(2, 1000),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
)
def test_the_text_is_a_function_of_target_prompt_parameters_and_seed(
    sampling: Sampling, share: float, other: int, lengths: list[int]
) -> None:
    alone, _ = generate(lambda prefix, length: [], [0], 12, sampling)
    small = blend(target, model(other), share)
    assert generate(drafting_with(small, sampling), lengths, 12, sampling)[0] == alone


@settings(max_examples=60, deadline=None)
@given(sampling=samplings, junk=st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=6), min_size=1, max_size=4))
def test_not_even_a_malicious_drafter_changes_the_text(sampling: Sampling, junk: list[list[int]]) -> None:
    alone, _ = generate(lambda prefix, length: [], [0], 12, sampling)
    assert generate(lambda prefix, length: junk[len(prefix) % len(junk)], [0], 12, sampling)[0] == alone


def test_another_seed_is_another_text() -> None:
    """The other direction: sampled text does vary, only not with the drafter."""
    texts = {tuple(generate(lambda p, k: [], [0], 12, WARM.model_copy(update={"seed": s}))[0]) for s in range(20)}
    assert len(texts) == 20


# --- 4. Shared noise is what makes two models agree ------------------------------------------------------------------


def test_the_target_as_its_own_drafter_is_always_accepted() -> None:
    _, rounds = generate(drafting_with(target, WARM), [4], 40, WARM)
    assert rounds == 40 / (4 + 1)


def agreement(small: Model, seed_of_the_edge: Callable[[int], int], n: int = 600) -> float:
    """How often draft and target draw the same token."""
    prefixes = [[*PROMPT, i % VOCAB, i // VOCAB] for i in range(n)]
    here = [next_token(small, p, Sampling(temperature=1.0, seed=seed_of_the_edge(i))) for i, p in enumerate(prefixes)]
    there = [next_token(target, p, Sampling(temperature=1.0, seed=i)) for i, p in enumerate(prefixes)]
    return float(np.mean(np.equal(here, there)))


def test_with_noise_of_its_own_even_a_perfect_drafter_is_mostly_wrong() -> None:
    assert agreement(target, lambda i: i) == 1.0
    assert agreement(target, lambda i: i + 10**6) < 0.6


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_agreement_is_at_least_what_the_theorem_promises(share: float) -> None:
    """Daliri et al. 2024: coupled draws agree with probability >= (1 - d) / (1 + d), d the total variation distance."""
    small, exact = blend(target, model(2), share), Sampling(temperature=1.0)
    prefixes = [[*PROMPT, i % VOCAB, i // VOCAB] for i in range(600)]
    distances = [
        np.abs(np.subtract(law(small(p).tolist(), exact), law(target(p).tolist(), exact))).sum() / 2 for p in prefixes
    ]
    promised = float(np.mean([(1 - d) / (1 + d) for d in distances]))
    assert agreement(small, lambda i: i) > promised - 0.06  # 600 samples: 3 standard errors


def test_the_closer_the_drafter_the_fewer_the_rounds() -> None:
    rounds = [
        generate(drafting_with(blend(target, model(2), share), WARM), [4], 60, WARM)[1] for share in (0.0, 0.2, 0.6)
    ]
    assert rounds == sorted(rounds)
    assert rounds[0] < rounds[-1]


# --- 5. What "equal" means on real hardware --------------------------------------------------------------------------


def test_the_gap_says_how_near_a_draw_was_to_another() -> None:
    """Two honest machines differ in a logit's last bits, so a near-tie may fall either way: the gap says how near."""
    sums = perturbed(target(PROMPT)[None], [len(PROMPT)], WARM)[0]
    second, first = np.sort(sums)[-2:]
    gap = (first - second) * 0.9  # back to the units of a logit
    nudged = target(PROMPT).copy()
    nudged[sums.argmax()] -= np.float32(gap * 0.99)
    assert draw(nudged[None], [len(PROMPT)], WARM)[0] == sums.argmax()
    nudged[sums.argmax()] -= np.float32(gap * 0.02)
    assert draw(nudged[None], [len(PROMPT)], WARM)[0] != sums.argmax()


def test_a_bug_shared_by_both_sides_would_pass_every_test_above() -> None:
    """Suppose both forgot the position. Text would still not depend on the drafter, but it would not be a sample.

    So the draw itself is tested once, against the exact distribution: test_sampling_law.py.
    """
    flat: Model = lambda prefix: np.zeros(VOCAB, np.float32)  # noqa: E731
    forgetful = {int(draw(flat([])[None], [0], WARM)[0]) for position in range(50)}
    honest = {int(draw(flat([])[None], [position], WARM)[0]) for position in range(50)}
    assert len(forgetful) == 1
    assert len(honest) > 10
