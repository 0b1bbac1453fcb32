"""A verifier without a model: its draws are a hash of the prefix, so a protocol or chaos test knows the right answer.

Switches: `flip_rate` makes a worker disagree with its peers now and then, as two machines do at numerical near-ties;
`fail_on` makes chosen requests or steps fail; `step_ms` makes a pass take time. Deterministic, and never random.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pilotfish.cloud_worker.engines.base import EngineInfo, Verifier, VerifyEvent, VerifyRequest, check_request
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
        fail_on: FailOn | None = None,
    ) -> None:
        mark = hashlib.sha256(f"fake 1 {vocab}".encode()).hexdigest()
        self.info = EngineInfo("fake", "1", mark, vocab, context, draft_max, "fake")
        self.passes = 0
        self._flip_rate, self._flip_seed = flip_rate, flip_seed
        self._step_ms, self._fail_on = step_ms, fail_on
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
        self._rounds.pop(request_id, None)

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
        return [self._advance(round_) for round_ in oldest.values()]

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
        draws = self._draws(request.sampling, round_.ids, draft)
        rows = len(round_.ids) - cached + len(draft)
        return self._emit(round_, draws, rows, cached if round_.first else 0)

    def _draws(self, sampling: Sampling, prefix: list[int], draft: list[int]) -> list[int]:
        """Draws after the prefix and after each accepted draft token, the last one being the correction or bonus."""
        target = FakeTarget(prefix, sampling, self.info.vocab_size)
        switches = (self.info.vocab_size, self._flip_rate, self._flip_seed)
        draws: list[int] = []
        for i in range(len(draft) + 1):
            draws.append(flipped_draw(target, len(prefix) + i, *switches))
            if i == len(draft) or draws[-1] != draft[i]:
                break
            target.extend(draws[-1:])
        return draws

    def _emit(self, round_: _Round, draws: list[int], rows: int, cached: int) -> VerifyEvent:
        request = round_.request
        round_.ids.extend(draws)
        self._remember(request.session, round_.ids)
        round_.left -= 0 if round_.first else 1
        round_.first = False
        done = round_.left == 0 or any(t in request.stop_ids for t in draws)
        if done:
            del self._rounds[request.request_id]
        return VerifyEvent(request.request_id, draws, len(draws) - 1, rows, 1, cached, done)

    def _cached(self, request: VerifyRequest, ids: list[int]) -> int:
        held = self._resident.get(request.session, [])
        n = min(len(held), len(ids) - 1)
        if held[:n] == ids[:n]:
            return n
        return next(i for i in range(n) if held[i] != ids[i])

    def _remember(self, session: str, ids: list[int]) -> None:
        self._resident[session] = ids[:-1]  # the last draw was never computed
        self._resident.move_to_end(session)
        while len(self._resident) > _SESSIONS:
            self._resident.popitem(last=False)
