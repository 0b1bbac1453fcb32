"""Messages that are almost right: changes to bytes and to structure, from a seed, so that a failure replays.

`Guided` keeps what took a step from line to line that nothing before it took, and changes it further.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
from typing import Any

import msgpack

SESSION = "0" * 32

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), 0.5, -0.0, 1e308, float("nan"),
    float("inf"), float("-inf"), "", "a", "x" * 70, "\x00", "verify", "verdict", SESSION, b"", b"d" * 16, b"\xff",
    [], {}, [1], [-1], [None], [[1]], ["a"], [2**31 - 1] * 40, {"a": 1}, {"seed": -1}, {"temperature": 1}, {b"a": 1},
    {1: 1}, msgpack.ExtType(0, b""), msgpack.ExtType(127, b"abc"), msgpack.Timestamp(1, 2),
]  # fmt: skip

Body = dict[Any, Any]


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def splice(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at + rng.randint(0, 9) :]


def claim_length(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    header = rng.choice([b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"]) + rng.randbytes(4)
    return data[:at] + header + data[at:]


def change_a_value(rng: random.Random, body: Body) -> Body:
    where = body
    if isinstance(body.get("sampling"), dict) and rng.random() < 0.2:
        where = body["sampling"]
    where[rng.choice(list(where) or ["a"])] = rng.choice(ODD)
    return body


def change_an_item(rng: random.Random, body: Body) -> Body:
    arrays = [value for value in body.values() if isinstance(value, list) and value]
    if arrays:
        chosen = rng.choice(arrays)
        chosen[rng.randrange(len(chosen))] = rng.choice(ODD)
    return body


def change_a_key(rng: random.Random, body: Body) -> Body:
    body[rng.choice(["extra", "", "V", b"v", 0, "type", "v", "x" * 300])] = body.pop(rng.choice(list(body)))
    return body


def drop_a_key(rng: random.Random, body: Body) -> Body:
    body.pop(rng.choice(list(body)))
    return body


def nest(rng: random.Random, body: Body) -> Body:
    value: Any = rng.choice(ODD)
    for _ in range(rng.randint(1, 60)):
        value = [value] if rng.random() < 0.5 else {"a": value}
    body[rng.choice(list(body))] = value
    return body


def double_a_key(rng: random.Random, data: bytes) -> bytes:
    """A map with one key twice: the fields of two bodies, one after the other."""
    first = msgpack.unpackb(data)
    second = {key: rng.choice([value, *ODD]) for key, value in first.items() if rng.random() < 0.5}
    packer = msgpack.Packer()
    pairs = b"".join(packer.pack(k) + packer.pack(v) for b in (first, second) for k, v in b.items())
    return bytes(packer.pack_map_header(len(first) + len(second))) + pairs


ON_BYTES: list[Callable[[random.Random, bytes], bytes]] = [
    flip_bits,
    flip_bits,
    cut,
    splice,
    claim_length,
    double_a_key,
]
ON_BODIES: list[Callable[[random.Random, Body], Body]] = [
    change_a_value, change_a_value, change_an_item, change_a_key, drop_a_key, nest,
]  # fmt: skip


def mutate(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.5:
        return rng.choice(ON_BYTES)(rng, data)
    body = rng.choice(ON_BODIES)(rng, msgpack.unpackb(data))
    return bytes(msgpack.packb(body))


# --- guided by coverage ----------------------------------------------------------------------------------------

TRACE_EVERY = 8  # tracing costs ten times the execution
CORPUS_MAX = 512
Arc = tuple[str, int, int]  # a file, the line before, the line


class Guided:
    """Inputs for a target whose code is in `modules`: mutations of `seeds`, and of what turned out to lead on."""

    def __init__(self, seed: int, seeds: Sequence[bytes], modules: Sequence[ModuleType]) -> None:
        self.rng = random.Random(seed)
        self.corpus, self.arcs = list(seeds), set[Arc]()
        self._files = {module.__file__ for module in modules}
        self._executed = 0

    def mutated(self, fresh: bytes | None = None) -> bytes:
        """The next input; `fresh` is a message that fits the target's state of now, and mostly the one to change."""
        data = fresh if fresh and self.rng.random() < 0.7 else self.rng.choice(self.corpus)
        for _ in range(self.rng.choice([0, 1, 1, 1, 2, 3])):
            try:
                data = mutate(self.rng, data) or data
            except Exception:  # an earlier change left nothing to change in this way
                continue
        return data

    def execute(self, target: Callable[[bytes], None], data: bytes) -> None:
        """Run the target; every TRACE_EVERY-th time, look where it went."""
        self._executed += 1
        if self._executed % TRACE_EVERY:
            target(data)
            return
        reached, before = set[Arc](), sys.gettrace()
        sys.settrace(self._tracer(reached))
        try:
            target(data)
        finally:
            sys.settrace(before)
        if not reached <= self.arcs:
            self.arcs |= reached
            self.corpus.append(data)
            del self.corpus[:-CORPUS_MAX]

    def _tracer(self, reached: set[Arc]) -> Any:
        before = 0

        def note(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal before
            reached.add((frame.f_code.co_filename, before, frame.f_lineno))
            before = frame.f_lineno
            return note

        return lambda frame, event, _: note(frame, event, _) if frame.f_code.co_filename in self._files else None
