"""The logits behind an engine's draws: the real verifier in a child process, its draw overheard.

A verifier says ids only; to tell a near-tie from a fault `bench exact` must see the numbers. The child opens the same
engine as a worker does and replaces the name `draw` (llama.cpp) or `sample` (vLLM) in its module by one that notes the
logits and goes on. Requests are told apart by their seeds. Both engines never share a process with each other.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Self

import numpy as np

from pilotfish.bench.piped import Piped, serve
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


class Probe(Piped):
    """`with Probe(spec) as probe: probe.answers(Ask(...), ...)`."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(__name__, {"OMP_NUM_THREADS": str(spec.threads), "KMP_BLOCKTIME": "0"})
        self.spec = spec

    def __enter__(self) -> Self:
        super().__enter__()
        self.ask(asdict(self.spec))
        return self

    def answers(self, *asks: Ask) -> list[Answer]:
        """One for each ask; they share the engine's passes."""
        vocab, told = self.ask([asdict(ask) for ask in asks])
        return [Answer(np.frombuffer(rows, np.float32).reshape(-1, vocab), tuple(draws)) for rows, draws in told]


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
                self.by_seed[runner.asked[request].sampling.seed].append(numbers[start : start + drafted + 1])
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


class Child:
    """Opens the engine of the first question, then answers."""

    def __init__(self) -> None:
        self.heard = Overheard()
        self.engine: Verifier | None = None

    def handle(self, question: Any) -> Any:
        """A specification, or a list of asks."""
        if self.engine is not None:
            return answer(self.engine, self.heard, question)
        spec = EngineSpec(**question)
        cores.bind(spec.cores)
        self.heard.listen(spec.engine)
        self.engine, _ = open_verifier(spec)
        return "open"


if __name__ == "__main__":
    serve(Child().handle)
