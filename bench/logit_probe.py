"""The logits behind an engine's draws: the real verifier in a child process, its draw overheard.

A verifier says ids only; to tell a near-tie from a fault `bench exact` must see the numbers. The child opens the same
engine as a worker does and replaces the name `draw` (llama.cpp) or `sample` (vLLM) in its module by one that notes the
logits and goes on. Requests are told apart by their seeds. Both engines never share a process with each other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import IO, Any, Self

import msgpack
import numpy as np

from pilotfish.bench.children import end
from pilotfish.cloud_worker.engines.base import Verifier, VerifyRequest
from pilotfish.cloud_worker.engines.spec import EngineSpec, open_verifier
from pilotfish.protocol import cores
from pilotfish.protocol.errors import EngineError
from pilotfish.protocol.messages import Sampling
from pilotfish.protocol.sampling import Float32s


@dataclass(frozen=True, slots=True)
class Ask:
    """One job of a session: the logits wanted are those after `prefix`, after each of `draft`, and of the continuation.

    With a draft the engine must not continue: a rejected one would end the rows asked for.
    """

    session: str
    prefix: tuple[int, ...]
    draft: tuple[int, ...] = ()
    continue_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """`rows` [len(draft) + 1 + continue_tokens, vocab] float32, and the ids the engine drew."""

    rows: Float32s
    draws: tuple[int, ...]


class Probe:
    """`with Probe(spec) as probe: probe.answers(Ask(...), ...)`."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec

    def __enter__(self) -> Self:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.spec.threads), "KMP_BLOCKTIME": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._ask(asdict(self.spec))
        return self

    def __exit__(self, *_: object) -> None:
        end(self._process)

    def answers(self, *asks: Ask) -> list[Answer]:
        """One for each ask; they share the engine's passes."""
        vocab, told = self._ask([asdict(ask) for ask in asks])
        return [Answer(np.frombuffer(rows, np.float32).reshape(-1, vocab), tuple(draws)) for rows, draws in told]

    def _ask(self, frame: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        try:
            send(self._process.stdin, frame)
            return receive(self._process.stdout)
        except (BrokenPipeError, EOFError):
            raise EngineError(f"the {self.spec.engine} probe ended: its errors are above") from None


def send(file: IO[bytes], value: Any) -> None:
    """One msgpack value behind its length in four bytes."""
    data: bytes = msgpack.packb(value)
    file.write(len(data).to_bytes(4, "little") + data)
    file.flush()


def receive(file: IO[bytes]) -> Any:
    """The next value. Raises EOFError at the end."""
    if not (head := file.read(4)):
        raise EOFError
    return msgpack.unpackb(file.read(int.from_bytes(head, "little")))


# --- child side ----------------------------------------------------------------------------------------------


class Overheard:
    """Logits of every pass, by the seed of the request they belong to."""

    def __init__(self) -> None:
        self.by_seed: defaultdict[int, list[Float32s]] = defaultdict(list)

    def listen(self, engine: str) -> None:
        """Take the place of the engine's draw. Before the engine opens."""
        if engine == "vllm":
            self._listen_to_vllm()
        elif engine == "llamacpp":
            self._listen_to_llamacpp()
        else:
            raise EngineError(f"the {engine} engine has no logits to overhear")

    def _listen_to_llamacpp(self) -> None:
        llamacpp: Any = import_module("pilotfish.cloud_worker.engines.llamacpp")
        draw = llamacpp.draw

        def overheard(logits: Float32s, positions: Any, sampling: Sampling) -> Any:
            self.by_seed[sampling.seed].append(logits.copy())
            return draw(logits, positions, sampling)

        llamacpp.draw = overheard

    def _listen_to_vllm(self) -> None:
        vllm_runner: Any = import_module("pilotfish.cloud_worker.engines.vllm_runner")
        sample = vllm_runner.sample

        def overheard(runner: Any, logits: Any, metadata: Any) -> Any:
            start, numbers = 0, logits.float().cpu().numpy()
            for request, drafted in zip(runner.input_batch.req_ids, metadata.num_draft_tokens, strict=True):
                sampling = runner.requests[request].sampling_params.extra_args[vllm_runner.ROUND].sampling
                self.by_seed[sampling.seed].append(numbers[start : start + drafted + 1])
                start += drafted + 1
            return sample(runner, logits, metadata)

        vllm_runner.sample = overheard


def answer(engine: Verifier, heard: Overheard, asks: list[dict[str, Any]]) -> tuple[int, list[tuple[bytes, list[int]]]]:
    """Submit every ask at once, step until all are done: vocabulary size, then (rows, draws) of each."""
    heard.by_seed.clear()
    draws: dict[str, list[int]] = {str(number): [] for number in range(len(asks))}
    for number, ask in enumerate(asks):
        sampling = Sampling(temperature=1.0, seed=number)
        engine.submit(VerifyRequest(str(number), sampling=sampling, **ask))
    while engine.busy:
        for event in engine.step():
            draws[event.request_id] += event.draws
    told = [(_wanted(heard.by_seed[number], ask), draws[str(number)]) for number, ask in enumerate(asks)]
    return engine.info.vocab_size, told


def _wanted(passes: list[Float32s], ask: dict[str, Any]) -> bytes:
    """The rows asked for: the last ones, for a prefix that came in chunks has rows nobody wants."""
    count = len(ask["draft"]) + 1 + ask["continue_tokens"]
    return np.concatenate(passes).astype(np.float32)[-count:].tobytes()


def main() -> None:
    """Serve until standard input ends. What libraries print goes to standard error."""
    out: IO[bytes] = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    spec = EngineSpec(**receive(sys.stdin.buffer))
    cores.bind(spec.cores)
    heard = Overheard()
    heard.listen(spec.engine)
    engine, _ = open_verifier(spec)
    send(out, "open")
    with suppress(EOFError):
        while True:
            send(out, answer(engine, heard, receive(sys.stdin.buffer)))
    engine.close()


if __name__ == "__main__":
    main()
