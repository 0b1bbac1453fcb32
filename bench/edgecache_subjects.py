"""What `bench edgecache` compares: our drafter with its cache, the same without, and llama-cpp-python's RAM cache.

Each answers prompts of token ids by a few tokens and counts the ids it evaluated for them. The baseline is driven
through its own public calls (`set_cache`, `create_completion`), with the same model, threads and KV type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from pilotfish.cache.edge_cache import EdgeCache
from pilotfish.cache.model_build import ModelBuild
from pilotfish.cache.state_folder import StateFolder
from pilotfish.edge_agent.drafters.llamacpp import KV, LlamaCppDrafter
from pilotfish.protocol.messages import Sampling

CONTEXT = 4096
ANSWER = 4  # tokens
PLENTY = 10**12  # bytes: nothing is evicted here, both keep the same conversations


class Subject(ABC):
    """One way to keep conversations; `close` frees it."""

    @abstractmethod
    def answer(self, ids: Sequence[int]) -> int:
        """Write ANSWER tokens after a prompt; how many ids were evaluated for them. What was computed is kept."""

    @abstractmethod
    def restore(self, ids: Sequence[int]) -> float:
        """Seconds until a kept conversation is back, all but its last id: look-up, copy, roll back."""

    @property
    @abstractmethod
    def counted_bytes(self) -> int:
        """What it believes to take."""

    @abstractmethod
    def close(self) -> None:
        """Free it."""


class Drafter(Subject):
    """Ours: a session per prompt, closed after its answer. With a folder, closed sessions go to disk too."""

    def __init__(self, model: Path, *, cached: bool = True, folder: Path | None = None) -> None:
        build = ModelBuild.of(model, KV)
        states = StateFolder(folder, build, model=model.stem, context=CONTEXT, budget_bytes=PLENTY) if folder else None
        self._cache = EdgeCache(PLENTY, states) if cached else None
        self._drafter = LlamaCppDrafter(model, context=CONTEXT, cache=self._cache)

    def answer(self, ids: Sequence[int]) -> int:
        """See `Subject.answer`."""
        draft = self._drafter.draft("s", ids, ANSWER, Sampling())
        self._drafter.close_session("s")
        return draft.prefilled + len(draft.ids) - 1

    def restore(self, ids: Sequence[int]) -> float:
        """See `Subject.restore`."""
        start = perf_counter()
        evaluated = self._drafter.sync("s", ids)
        seconds = perf_counter() - start
        assert evaluated == 1, f"{evaluated} ids of {len(ids)} were not restored"
        self._drafter.close_session("s")
        return seconds

    @property
    def counted_bytes(self) -> int:
        """See `Subject.counted_bytes`."""
        return self._cache.statistics.bytes if self._cache else 0

    def close(self) -> None:
        """See `Subject.close`."""
        self._drafter.close()


class RamCache(Subject):
    """llama-cpp-python's `Llama` with `LlamaRAMCache`."""

    def __init__(self, model: Path) -> None:
        import llama_cpp

        self._llama: Any = llama_cpp.Llama(str(model), n_ctx=CONTEXT, n_threads=1, n_threads_batch=1, verbose=False)
        self._cache: Any = llama_cpp.LlamaRAMCache(PLENTY)
        self._llama.set_cache(self._cache)
        self._eval, self._llama.eval = self._llama.eval, self._noted
        self._evaluated = 0

    def _noted(self, tokens: Sequence[int]) -> None:
        self._evaluated += len(tokens)
        self._eval(tokens)

    def answer(self, ids: Sequence[int]) -> int:
        """See `Subject.answer`."""
        self._evaluated = 0
        self._llama.reset()  # each prompt is a conversation of its own
        self._llama.create_completion(list(ids), max_tokens=ANSWER, temperature=0.0)
        return self._evaluated

    def restore(self, ids: Sequence[int]) -> float:
        """See `Subject.restore`."""
        start = perf_counter()
        self._llama.load_state(self._cache[list(ids)])
        return perf_counter() - start

    @property
    def counted_bytes(self) -> int:
        """See `Subject.counted_bytes`."""
        return int(self._cache.cache_size)

    def close(self) -> None:
        """See `Subject.close`."""
        self._llama.close()
