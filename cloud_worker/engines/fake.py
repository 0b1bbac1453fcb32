"""A verifier without a model: its draws are a hash of the prefix, so a protocol or chaos test knows the right answer.

Switches: `flip_rate` makes a worker disagree with its peers now and then, as two machines do at numerical near-ties;
`fail_on` makes chosen requests or steps fail; `step_ms` and `row_us` make a pass and each of its rows take time. With
`kv_blocks` it pretends a prefix cache (`fake_cache.py`); unless `resident`, it keeps no session's KV between rounds.
Deterministic, and never random.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pilotfish.cloud_worker.engines.base import (
    EngineInfo,
    KvChange,
    Verifier,
    VerifyEvent,
    VerifyRequest,
    check_request,
)
from pilotfish.cloud_worker.engines.fake_cache import FakeBlockCache
from pilotfish.protocol.messages import Sampling

FailOn = Callable[[VerifyRequest], "str | Exception | None"]
"""Asked once per request, at its first step: a sentence fails that request, an exception is raised out of `step`."""

VOCAB = 256
_SESSIONS = 64


class FakeTarget:
    """The target's draw after a prefix that grows token by token: a running hash, so long prefixes cost little."""

    def __init__(self, prefix: Sequence[int], sampling: Sampling, vocab: int, salt: str = "") -> None:
        seed = sampling.seed if sampling.temperature else 0
        self._hash = hashlib.blake2b(f"{salt}|{sampling.temperature!r}|{seed}|".encode(), digest_size=16)
        self._vocab = vocab
        self.extend(prefix)

    def extend(self, ids: Sequence[int]) -> None:
        """Append to the prefix."""
        self._hash.update(array("I", ids).tobytes())

    def draw(self, position: int) -> int:
        """The draw at `position`, which is the length of the prefix."""
        return self.number(position) % self._vocab

    def number(self, position: int) -> int:
        """64 bits that depend on all of it."""
        state = self._hash.copy()
        state.update(position.to_bytes(8, "little"))
        return int.from_bytes(state.digest()[:8], "little")


def fake_target(prefix_ids: Sequence[int], position: int, sampling: Sampling, vocab: int = VOCAB) -> int:
    """The draw of an unflipped FakeVerifier at `position` (= len(prefix_ids)); the temperature and seed change it."""
    return FakeTarget(prefix_ids, sampling, vocab).draw(position)


def fake_logprob(token: int) -> float:
    """The log-probability a FakeVerifier claims for a draw: any number will do that a test can foretell."""
    return -(token + 1) / 256


def flipped_draw(target: FakeTarget, position: int, vocab: int, rate: float, seed: int) -> int:
    """The draw of a worker that reads a share `rate` of all positions, chosen by its `seed`, as the next id."""
    token = target.draw(position)
    if rate:
        coin = hashlib.blake2b(f"{seed}|{target.number(position)}".encode(), digest_size=8).digest()
        if int.from_bytes(coin, "little") < rate * 2**64:
            return (token + 1) % vocab
    return token


@dataclass(slots=True, eq=False)
class _Round:
    request: VerifyRequest
    ids: list[int]  # of the continuation: prefix and all draws so far
    left: int
    first: bool = True


class FakeVerifier(Verifier):
    """Draws `fake_target` everywhere, except where `flip_rate` > 0 and the hash with `flip_seed` says otherwise."""

    def __init__(
        self,
        *,
        vocab: int = VOCAB,
        context: int = 4096,
        draft_max: int = 16,
        flip_rate: float = 0.0,
        flip_seed: int = 0,
        step_ms: float = 0.0,
        row_us: float = 0.0,
        kv_blocks: int = 0,
        block_size: int = 16,
        resident: bool = True,
        fail_on: FailOn | None = None,
    ) -> None:
        mark = hashlib.sha256(f"fake 1 {vocab}".encode()).hexdigest()
        self._blocks = FakeBlockCache(kv_blocks, block_size) if kv_blocks else None
        cache = {"block_size": block_size, "kv_blocks": kv_blocks} if self._blocks else {}
        self.info = EngineInfo("fake", "1", mark, vocab, context, draft_max, "fake", logprobs=True, **cache)
        self.passes = 0
        self._flip_rate, self._flip_seed = flip_rate, flip_seed
        self._step_ms, self._row_us, self._fail_on, self._keeps = step_ms, row_us, fail_on, resident
        self._rounds: dict[str, _Round] = {}
        self._resident: OrderedDict[str, list[int]] = OrderedDict()

    @property
    def busy(self) -> bool:
        """True while some request waits for a step."""
        return bool(self._rounds)

    def submit(self, request: VerifyRequest) -> None:
        """Queue one request. Raises RequestRefused (with the sentence) if it can never be served."""
        check_request(request, self.info, self._rounds)
        self._rounds[request.request_id] = _Round(request, list(request.prefix), request.continue_tokens)

    def cancel(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        round_ = self._rounds.pop(request_id, None)
        if round_ and not self._keeps:
            self.forget(round_.request.session)

    def forget(self, session: str) -> None:
        """Drop a session's pretended KV."""
        self._resident.pop(session, None)

    def step(self) -> list[VerifyEvent]:
        """One pretended pass for the oldest request of every session."""
        if not self._rounds:
            return []
        time.sleep(self._step_ms / 1000)
        self.passes += 1
        oldest: dict[str, _Round] = {}
        for round_ in self._rounds.values():
            oldest.setdefault(round_.request.session, round_)
        events = [self._advance(round_) for round_ in oldest.values()]
        time.sleep(sum(event.rows for event in events) * self._row_us / 1e6)
        return events

    def kv_changes(self) -> list[KvChange]:
        """Of the pretended prefix cache."""
        return self._blocks.take() if self._blocks else []

    def _advance(self, round_: _Round) -> VerifyEvent:
        request = round_.request
        failure = self._fail_on(request) if self._fail_on and round_.first else None
        if failure is not None:
            del self._rounds[request.request_id]
            if isinstance(failure, Exception):
                raise failure
            return VerifyEvent(request.request_id, [], error=failure)
        draft = request.draft if round_.first else []
        cached = self._cached(request, round_.ids)
        draws = self._draws(request.sampling, round_.ids, draft, forced=request.score)
        rows = len(round_.ids) - cached + len(draft)
        return self._emit(round_, draws, rows, cached if round_.first else 0)

    def _draws(self, sampling: Sampling, prefix: list[int], draft: list[int], *, forced: bool) -> list[int]:
        """Draws after the prefix and after each accepted draft token, the last one being the correction or bonus.

        With `forced` after each draft token, accepted or not.
        """
        target = FakeTarget(prefix, sampling, self.info.vocab_size)
        switches = (self.info.vocab_size, self._flip_rate, self._flip_seed)
        draws: list[int] = []
        for i in range(len(draft) + 1):
            draws.append(flipped_draw(target, len(prefix) + i, *switches))
            if i == len(draft) or (draws[-1] != draft[i] and not forced):
                break
            target.extend(draft[i : i + 1])
        return draws

    def _emit(self, round_: _Round, draws: list[int], rows: int, cached: int) -> VerifyEvent:
        request = round_.request
        accepted = _agreeing(request.draft, draws) if round_.first else len(draws) - 1
        round_.ids.extend([*request.draft, draws[-1]] if request.score else draws)
        self._remember(request, round_.ids)
        logprobs = [fake_logprob(token) for token in draws] if request.logprobs else []
        round_.left -= 0 if round_.first else 1
        round_.first = False
        done = round_.left == 0 or any(t in request.stop_ids for t in draws)
        if done:
            del self._rounds[request.request_id]
            if not self._keeps:
                self.forget(request.session)
        return VerifyEvent(request.request_id, draws, accepted, rows, 1, cached, done, logprobs=logprobs)

    def _cached(self, request: VerifyRequest, ids: list[int]) -> int:
        held = self._resident.get(request.session, [])
        n = min(len(held), len(ids) - 1)
        resident = n if held[:n] == ids[:n] else next(i for i in range(n) if held[i] != ids[i])
        return max(resident, self._blocks.cached(ids, request.cache_salt) if self._blocks else 0)

    def _remember(self, request: VerifyRequest, ids: list[int]) -> None:
        computed = ids[:-1]  # the last draw was not
        if self._blocks:
            self._blocks.computed(computed, request.cache_salt)
        self._resident[request.session] = computed
        self._resident.move_to_end(request.session)
        while len(self._resident) > _SESSIONS:
            self._resident.popitem(last=False)


def _agreeing(draft: Sequence[int], draws: Sequence[int]) -> int:
    """How many draft tokens come before the first that was not drawn."""
    pairs = zip(draft, draws, strict=False)
    return next((i for i, (drafted, drawn) in enumerate(pairs) if drafted != drawn), len(draft))
