"""What every Verifier must do, as plain functions that take an open engine.

The oracle is the engine itself without drafts: an empty draft and `continue_tokens`, one token per pass. An engine
under test must serve at least 4 sessions at once, a context of at least 256 tokens, drafts of at least 4, and ids
below 200. Session names are fresh per call (`fresh`), so checks may share one engine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import count

import pytest

from pilotfish.cloud_worker.engines.base import Verifier, VerifyEvent, VerifyRequest
from pilotfish.protocol.errors import RequestRefused
from pilotfish.protocol.messages import Sampling

SAMPLINGS = {
    "T 0": Sampling(),
    "T 0.7, top-p 0.9": Sampling(temperature=0.7, top_p=0.9, seed=1),
    "T 1, top-k 20": Sampling(temperature=1.0, top_k=20, seed=2**63 + 5),
    "T 1.3": Sampling(temperature=1.3, seed=3),
}
PROMPT = [5, 17, 99, 4, 150, 33, 8, 121, 60, 2, 77]
_numbers = count()


def fresh(what: str = "s") -> str:
    """A name never used before in this process, 32 hex digits like a session id."""
    return f"{next(_numbers):x}{what.encode().hex()}".zfill(32)[:32]


def run(engine: Verifier, *requests: VerifyRequest) -> dict[str, list[VerifyEvent]]:
    """Submit and step until nothing is left; the events per request id, checked for order."""
    for request in requests:
        engine.submit(request)
    events: dict[str, list[VerifyEvent]] = {r.request_id: [] for r in requests}
    steps = 0
    while engine.busy:
        for event in engine.step():
            events[event.request_id].append(event)
        steps += 1
        assert steps < 10_000, "the engine stays busy for ever"
    for request in requests:
        _well_formed(request, events[request.request_id])
    return events


def _well_formed(request: VerifyRequest, events: Sequence[VerifyEvent]) -> None:
    assert events, "a request ended without an event"
    assert [e.done for e in events] == [False] * (len(events) - 1) + [True]
    assert not events[0].error, events[0].error
    assert len(events[0].draws) == events[0].accepted + 1
    assert events[0].draws[:-1] == request.draft[: events[0].accepted]
    assert events[0].steps >= 1
    assert events[0].cached < len(request.prefix)
    assert sum(len(e.draws) for e in events[1:]) <= request.continue_tokens


def round_(engine: Verifier, session: str, prefix: list[int], draft: list[int], sampling: Sampling) -> VerifyEvent:
    """One verify round by itself."""
    request = VerifyRequest(fresh("r"), session, list(prefix), list(draft), sampling)
    (event,) = run(engine, request)[request.request_id]
    return event


def plain(engine: Verifier, prefix: list[int], n: int, sampling: Sampling) -> list[int]:
    """n tokens of plain decoding, one per pass."""
    request = VerifyRequest(fresh("r"), fresh("plain"), list(prefix), [], sampling, continue_tokens=n - 1)
    draws = [t for event in run(engine, request)[request.request_id] for t in event.draws]
    engine.forget(request.session)
    assert len(draws) == n
    return draws


Drafts = Callable[[list[int], list[int], int], list[int]]  # (right ids ahead, ids so far, longest) -> a draft


def drafted(engine: Verifier, prefix: list[int], right: list[int], sampling: Sampling, drafts: Drafts) -> list[int]:
    """As many tokens as `right`, by rounds of drafts."""
    session, ids, end = fresh("drafted"), list(prefix), len(prefix) + len(right)
    while len(ids) < end:
        ahead = right[len(ids) - len(prefix) :]
        ids += round_(engine, session, ids, drafts(ahead, ids, engine.info.draft_max), sampling).draws
    engine.forget(session)
    return ids[len(prefix) : end]


def _random_drafts(seed: int) -> Drafts:
    rng = random.Random(seed)

    def draft(ahead: list[int], ids: list[int], longest: int) -> list[int]:
        n = rng.randint(0, longest)
        return [t if rng.random() < 0.8 else rng.randrange(200) for t in ahead[:n]]

    return draft


DRAFTS: dict[str, Drafts] = {
    "all right": lambda ahead, ids, longest: ahead[: longest // 2],
    "all wrong": lambda ahead, ids, longest: [(t + 1) % 200 for t in ahead[: longest // 2]],
    "empty": lambda ahead, ids, longest: [],
    "longest": lambda ahead, ids, longest: (ahead + [7] * longest)[:longest],
    "random": _random_drafts(4),
}


# --- the checks ----------------------------------------------------------------------------------------------


def check_drafts_change_nothing(engine: Verifier, sampling: Sampling, drafts: Drafts, n: int = 40) -> None:
    right = plain(engine, PROMPT, n, sampling)
    assert drafted(engine, PROMPT, right, sampling, drafts) == right


def check_accepts_what_it_would_draw(engine: Verifier, sampling: Sampling) -> None:
    """Acceptance is judged token by token: a wrong id in the middle is replaced, what follows it is not looked at."""
    right = plain(engine, PROMPT, 4, sampling)
    event = round_(engine, fresh(), PROMPT, right[:3], sampling)
    assert (event.accepted, event.draws) == (3, right)
    event = round_(engine, fresh(), PROMPT, [right[0], (right[1] + 1) % 200, right[2]], sampling)
    assert (event.accepted, event.draws) == (1, right[:2])


def check_scores(engine: Verifier, sampling: Sampling) -> None:
    """Every draw along a text that the target would not have written, and the session goes on as if nothing was."""
    right = plain(engine, PROMPT, 4, sampling)
    draft = [right[0], (right[1] + 1) % 200, 7, 9][: engine.info.draft_max]
    places = range(len(draft) + 1)
    want = [plain(engine, PROMPT + draft[:at], 1, sampling)[0] for at in places]
    session = fresh()
    request = VerifyRequest(fresh("r"), session, list(PROMPT), draft, sampling, score=True)
    engine.submit(request)
    events: list[VerifyEvent] = []
    while engine.busy:
        events += engine.step()
    (event,) = events
    assert (event.draws, event.accepted, event.done, event.error) == (want, 1, True, "")
    assert event.rows >= len(draft) + 1
    after = PROMPT + draft
    behind = plain(engine, after, 3, sampling)
    warm = round_(engine, session, [*after, behind[0]], behind[1:], sampling)
    assert warm.draws[:2] == behind[1:]
    with pytest.raises(RequestRefused, match="one of the two"):
        engine.submit(VerifyRequest(fresh("r"), session, list(PROMPT), draft, sampling, 3, score=True))


def check_scored_text_stays(engine: Verifier) -> None:
    """What was scored is the session's text: its KV serves the next round. For engines that keep sessions."""
    session, draft = fresh(), [7, 9, 11]
    request = VerifyRequest(fresh("r"), session, list(PROMPT), draft, Sampling(), score=True)
    engine.submit(request)
    while engine.busy:
        engine.step()
    assert round_(engine, session, [*PROMPT, *draft, 13], [], Sampling()).cached == len(PROMPT) + len(draft)


def check_counts(engine: Verifier) -> None:
    """A warm round computes what is missing of the prefix, one row per draft token, and at most one row of padding."""
    session, sampling = fresh(), Sampling()
    right = plain(engine, PROMPT, 8, sampling)
    cold = round_(engine, session, PROMPT, right[:2], sampling)
    assert cold.rows - (len(PROMPT) - cold.cached + 2) in (0, 1)
    warm = round_(engine, session, PROMPT + right[:3], right[3:6], sampling)
    assert warm.cached == len(PROMPT) + 2
    assert warm.rows == 4
    assert warm.steps == 1


def check_continuation(engine: Verifier, sampling: Sampling) -> None:
    """A round goes on by plain decoding after its bonus token, or after its correction."""
    right = plain(engine, PROMPT, 12, sampling)
    for draft in (right[:3], [(right[0] + 1) % 200]):
        request = VerifyRequest(fresh("r"), fresh(), list(PROMPT), draft, sampling, continue_tokens=5)
        events = run(engine, request)[request.request_id]
        draws = [t for e in events for t in e.draws]
        assert draws == right[: len(draws)]
        assert len(draws) == events[0].accepted + 1 + 5


def check_stop_ids(engine: Verifier, sampling: Sampling) -> None:
    """A stop id ends the continuation and is emitted; inside a draft it ends nothing but forbids a continuation."""
    right = plain(engine, PROMPT, 24, sampling)
    at = next((i for i in range(2, 24) if right[i] not in right[:i]), None)
    if at is None:
        pytest.fail("the model repeats itself: no id of its text can serve as a stop id")
    request = VerifyRequest(fresh("r"), fresh(), list(PROMPT), [], sampling, 30, (right[at],))
    draws = [t for e in run(engine, request)[request.request_id] for t in e.draws]
    assert draws == right[: at + 1]
    start = at - 1  # the stop id is the second token of the draft
    prefix, draft = PROMPT + right[:start], right[start : start + 3]
    request = VerifyRequest(fresh("r"), fresh(), prefix, draft, sampling, 30, (right[at],))
    (event,) = run(engine, request)[request.request_id]
    assert (event.accepted, event.draws) == (len(draft), right[start : start + len(draft) + 1])


def check_sessions_share_steps(engine: Verifier, n: int = 4) -> None:
    """Rounds of several sessions that wait together are answered by one step, each with its own draws."""
    prompts = [[*PROMPT, 10 + i] for i in range(n)]
    samplings = list(SAMPLINGS.values())
    rights = [plain(engine, p, 6, samplings[i % 4]) for i, p in enumerate(prompts)]
    sessions = [fresh() for _ in prompts]
    for i, p in enumerate(prompts):  # warm: every session has its sequence
        round_(engine, sessions[i], p, [], samplings[i % 4])
    for i, p in enumerate(prompts):
        request = VerifyRequest(fresh("r"), sessions[i], [*p, rights[i][0]], rights[i][1:4], samplings[i % 4])
        engine.submit(request)
    events: list[VerifyEvent] = []
    steps = 0
    while engine.busy:
        events += engine.step()
        steps += 1
    assert steps <= 2
    assert sorted(tuple(e.draws) for e in events) == sorted(tuple(r[1:5]) for r in rights)


def check_continuations_share_steps(engine: Verifier, n: int = 4) -> None:
    """Sessions that decode side by side get the text each would get alone."""
    prompts = [[*PROMPT, 20 + i] for i in range(n)]
    samplings = list(SAMPLINGS.values())
    alone = [plain(engine, p, 12, samplings[i % 4]) for i, p in enumerate(prompts)]
    requests = [
        VerifyRequest(fresh("r"), fresh(), p, [], samplings[i % 4], continue_tokens=11) for i, p in enumerate(prompts)
    ]
    events = run(engine, *requests)
    assert [[t for e in events[r.request_id] for t in e.draws] for r in requests] == alone


def check_redelivered(engine: Verifier, sampling: Sampling) -> None:
    """The same round again, as at-least-once delivery may bring it, gives the same draws."""
    session = fresh()
    right = plain(engine, PROMPT, 4, sampling)
    draft = [right[0], right[1], (right[2] + 1) % 200]
    first, second = (round_(engine, session, PROMPT, draft, sampling) for _ in range(2))
    assert first.draws == second.draws == right[:3]


def check_disagreeing(engine: Verifier, sampling: Sampling) -> None:
    """A peer's verdict won that parts from ours inside our draft, as at a near-tie: its history is the session's now.

    Our own round, delivered again, still gets our draws, whether it comes before the peer's history or beside it.
    """
    session, right = fresh(), plain(engine, PROMPT, 4, sampling)
    theirs = [*PROMPT, right[0], (right[1] + 1) % 200]
    behind = plain(engine, theirs, 4, sampling)
    for _ in range(2):
        assert round_(engine, session, PROMPT, right[:3], sampling).draws == right
        assert round_(engine, session, theirs, behind[:3], sampling).draws == behind
    ours = VerifyRequest(fresh("r"), session, list(PROMPT), right[:3], sampling)
    peers = VerifyRequest(fresh("r"), session, list(theirs), behind[:3], sampling)
    events = run(engine, ours, peers)
    assert [events[one.request_id][0].draws for one in (ours, peers)] == [right, behind]


def check_diverged_prefix(engine: Verifier, sampling: Sampling) -> None:
    """A session whose prefix is not what the engine remembers is served as if it were new."""
    session = fresh()
    round_(engine, session, PROMPT, plain(engine, PROMPT, 3, sampling), sampling)
    for other in ([*PROMPT[:6], 1, 2, 3, 9], PROMPT[:4], [9, 9, 9], PROMPT + [9] * 20):
        right = plain(engine, other, 4, sampling)
        assert round_(engine, session, other, right[:3], sampling).draws == right


def check_long_prefix_beside_rounds(engine: Verifier, n: int = 180) -> None:
    """A long prefill does not hold up the rounds of others, and neither changes the other's draws."""
    long = [(7 * i + i // 9) % 200 for i in range(n)]
    want_long, want = plain(engine, long, 3, Sampling()), plain(engine, PROMPT, 9, Sampling())
    session = fresh()
    round_(engine, session, PROMPT, [], Sampling())
    slow = VerifyRequest(fresh("r"), fresh(), long, want_long[:2])
    quick = VerifyRequest(fresh("r"), session, PROMPT + want[:1], want[1:4], continue_tokens=4)
    for request in (slow, quick):
        engine.submit(request)
    steps: list[list[VerifyEvent]] = []
    while engine.busy:
        steps.append(engine.step())
    said = {
        name: [(at, t) for at, step in enumerate(steps) for e in step if e.request_id == name for t in e.draws]
        for name in (slow.request_id, quick.request_id)
    }
    assert [token for _, token in said[slow.request_id]] == want_long
    assert [token for _, token in said[quick.request_id]] == want[1:]
    assert said[quick.request_id][0][0] <= said[slow.request_id][0][0], "the round waited for the prefill"


def check_context_full(engine: Verifier) -> None:
    """The last position of the context can be drawn; a token more is refused with a sentence, and nothing breaks."""
    context = engine.info.context
    prefix = [(3 * i) % 200 for i in range(context - 4)]
    assert len(round_(engine, fresh(), prefix, [1, 2, 3], Sampling()).draws) >= 1
    for draft, more in (([1, 2, 3, 4], 0), ([1, 2, 3], 1), ([], 4)):
        with pytest.raises(RequestRefused, match="context"):
            engine.submit(VerifyRequest(fresh("r"), fresh(), prefix, draft, continue_tokens=more))
    assert not engine.busy


def check_refusals(engine: Verifier) -> None:
    """Impossible requests are refused with a sentence; a request beside them is answered as if they were not there."""
    right = plain(engine, PROMPT, 3, Sampling())
    good = VerifyRequest(fresh("r"), fresh(), list(PROMPT), right[:2])
    vocab = engine.info.vocab_size
    engine.submit(good)
    bad = [
        ([], []),
        ([vocab], []),
        ([-1], []),
        (PROMPT, [vocab + 5]),
        (PROMPT, [-7]),
        (PROMPT, [1] * (engine.info.draft_max + 1)),
    ]
    for prefix, draft in bad:
        with pytest.raises(RequestRefused, match=r"\w+ .*\."):
            engine.submit(VerifyRequest(fresh("r"), fresh(), prefix, draft))
    events: list[VerifyEvent] = []
    while engine.busy:
        events += engine.step()
    assert [e.draws for e in events] == [right]


def check_cancel(engine: Verifier) -> None:
    """A cancelled request is never heard of again, whenever it is cancelled; its neighbour and session go on."""
    right = plain(engine, PROMPT, 12, Sampling())
    session = fresh()
    gone = VerifyRequest(fresh("r"), session, list(PROMPT), [], continue_tokens=50)
    stays = VerifyRequest(fresh("r"), fresh(), list(PROMPT), right[:2], continue_tokens=5)
    engine.submit(gone)
    engine.submit(stays)
    events = engine.step() + engine.step()
    engine.cancel(gone.request_id)
    engine.cancel("unknown")
    later: list[VerifyEvent] = []
    while engine.busy:
        later += engine.step()
    assert {e.request_id for e in later} <= {stays.request_id}
    assert [t for e in events + later if e.request_id == stays.request_id for t in e.draws] == right[:8]
    assert round_(engine, session, PROMPT, right[:3], Sampling()).draws == right[:4]
    engine.submit(gone)
    engine.cancel(gone.request_id)
    assert engine.step() == []
    assert not engine.busy


def check_many_sessions(engine: Verifier, n: int) -> None:
    """More sessions than the engine keeps, in rounds that interleave: some are computed again, all are right."""
    sampling = SAMPLINGS["T 1, top-k 20"]
    texts = [[*PROMPT, i] for i in range(n)]
    rights = [plain(engine, t, 12, sampling) for t in texts]
    sessions = [fresh() for _ in texts]
    for base in (0, 4, 8):
        requests = [
            VerifyRequest(fresh("r"), s, t + r[:base], r[base : base + 3], sampling)
            for s, t, r in zip(sessions, texts, rights, strict=True)
        ]
        events = run(engine, *requests)
        assert [events[r.request_id][0].draws for r in requests] == [r[base : base + 4] for r in rights]


def check_rounds_of_one_session_in_order(engine: Verifier) -> None:
    """Two rounds of one session may wait together; each gets its own draws."""
    right = plain(engine, PROMPT, 8, Sampling())
    session = fresh()
    first = VerifyRequest(fresh("r"), session, list(PROMPT), right[:3])
    second = VerifyRequest(fresh("r"), session, PROMPT + right[:4], right[4:7])
    events = run(engine, first, second)
    assert events[first.request_id][0].draws == right[:4]
    assert events[second.request_id][0].draws == right[4:8]


def check_forget(engine: Verifier) -> None:
    """A forgotten session is computed anew, and gives the same."""
    session = fresh()
    before = round_(engine, session, PROMPT, [1], Sampling())
    engine.forget(session)
    engine.forget("unknown")
    after = round_(engine, session, PROMPT, [1], Sampling())
    assert before.draws == after.draws
    assert after.rows - (len(PROMPT) - after.cached + 1) in (0, 1)


def check_logprobs(engine: Verifier) -> None:
    """One log-probability per draw, the same whether it was verified or decoded; none where none was asked for."""
    request = VerifyRequest(fresh("r"), fresh(), list(PROMPT), [], continue_tokens=5, logprobs=True)
    if not engine.info.logprobs:
        with pytest.raises(RequestRefused, match="log-probabilities"):
            engine.submit(request)
        return
    events = run(engine, request)[request.request_id]
    draws = [draw for event in events for draw in event.draws]
    decoded = [logprob for event in events for logprob in event.logprobs]
    for draft in (draws[:4], [*draws[:2], (draws[2] + 1) % 200]):
        verify = VerifyRequest(fresh("r"), fresh(), list(PROMPT), draft, logprobs=True)
        (event,) = run(engine, verify)[verify.request_id]
        assert len(event.logprobs) == len(event.draws) == event.accepted + 1
        assert event.logprobs == pytest.approx(decoded[: len(event.draws)], abs=1e-3)
        assert all(logprob <= 0 for logprob in event.logprobs)
    assert round_(engine, fresh(), PROMPT, draws[:2], Sampling()).logprobs == []


#: of engines that keep a session's KV between rounds
RESIDENT_CHECKS: list[Callable[[Verifier], None]] = [check_counts, check_scored_text_stays]
CHECKS: list[Callable[[Verifier], None]] = [
    check_sessions_share_steps,
    check_continuations_share_steps,
    check_long_prefix_beside_rounds,
    check_context_full,
    check_refusals,
    check_cancel,
    check_rounds_of_one_session_in_order,
    check_forget,
    check_logprobs,
]
SAMPLED_CHECKS: list[Callable[[Verifier, Sampling], None]] = [
    check_scores,
    check_accepts_what_it_would_draw,
    check_continuation,
    check_stop_ids,
    check_redelivered,
    check_disagreeing,
    check_diverged_prefix,
]


class Contract:
    """The checks of every verifier as tests. Subclass it where a fixture `engine` gives one that is open."""

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_contract(self, engine: Verifier, check: Callable[[Verifier], None]) -> None:
        check(engine)

    @pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
    @pytest.mark.parametrize("check", SAMPLED_CHECKS, ids=lambda check: check.__name__)
    def test_contract_at(
        self, engine: Verifier, check: Callable[[Verifier, Sampling], None], sampling: Sampling
    ) -> None:
        check(engine, sampling)


class ResidentContract(Contract):
    """Of engines that keep a session's KV between rounds, besides."""

    @pytest.mark.parametrize("check", RESIDENT_CHECKS, ids=lambda check: check.__name__)
    def test_contract_of_sessions_that_stay(self, engine: Verifier, check: Callable[[Verifier], None]) -> None:
        check(engine)
