"""The engines that `bench verify` and `bench capacity` compare, each in a child of its own on the same cores.

All are open at once and asked in turn, so that a machine that slows down slows down all of them; an idle one waits in a
read. Prompts are those of the evaluation set, as token ids: the same for every engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from pilotfish.bench import stock_child, verifier_child
from pilotfish.bench.piped import Piped
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.protocol import cores
from pilotfish.protocol.errors import EngineError

CONTEXT, DRAFT_MAX, SESSIONS = 4096, 16, 64
THREADS = 2
STRIDE = 37  # between evaluation prompts taken one after another: families alternate
#: vLLM's own speculation, in the words of its `speculative_config`
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


def need_vllm() -> None:
    """Raise EngineError with the fix unless vLLM is here."""
    from pilotfish.cloud_worker.engines.vllm_start import installed

    installed()


@contextmanager
def verifier(**changes: Any) -> Iterator[Piped]:
    """Our verifier on the demo target; `changes` are to its EngineSpec."""
    from pilotfish.demo import pair

    chosen = {"context": CONTEXT, "draft_max": DRAFT_MAX, "max_sessions": SESSIONS, "threads": threads(), **changes}
    spec = EngineSpec("vllm", str(pair.TARGET_DIR), **chosen)
    with Piped(verifier_child.MODULE, environment()) as child:
        child.ask({"do": "open", **asdict(spec)})
        yield child


@contextmanager
def stock(**settings: Any) -> Iterator[Piped]:
    """vLLM's `LLM` on the demo target, `settings` in its own words over the ones both sides share."""
    from pilotfish.demo import pair

    shared = {"model": str(pair.TARGET_DIR), "dtype": "float32", "max_model_len": CONTEXT, "max_num_seqs": SESSIONS}
    with Piped(stock_child.MODULE, environment()) as child:
        child.ask({"do": "open", "cores_": "", "threads": threads(), "settings": {**shared, **settings}})
        yield child


def own_draft(k: int) -> dict[str, Any]:
    """vLLM's speculation with the demo draft beside the target."""
    from pilotfish.demo import pair

    return {"method": "draft_model", "model": str(pair.DRAFT_DIR), "num_speculative_tokens": k}


@contextmanager
def together(**children: Any) -> Iterator[dict[str, Piped]]:
    """Several at once, by name."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(child) for name, child in children.items()}


def threads() -> int:
    """What each engine computes with, one engine at a time."""
    return min(THREADS, len(cores.available()))


def environment() -> dict[str, str]:
    """Set before a child imports its OpenMP runtime."""
    return {"OMP_NUM_THREADS": str(threads()), "KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}


def prompts(count: int) -> list[list[int]]:
    """Token ids of `count` evaluation prompts of all families, from the start again if there are fewer."""
    from tokenizers import Tokenizer

    from pilotfish.demo import pair
    from pilotfish.demo.tokenizer import chat

    tokenizer = Tokenizer.from_file(str(pair.TARGET_DIR / "tokenizer.json"))
    rows = [json.loads(line) for line in pair.EVAL_FILE.read_text(encoding="utf-8").splitlines()]
    spread = [rows[i * STRIDE % len(rows)] for i in range(count)]
    texts = [row["prompt"] if row["answer"] is None else chat(row["prompt"]) for row in spread]
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def long_prompt(tokens: int) -> list[int]:
    """Evaluation prompts one behind the other, cut at `tokens`. Raises EngineError if there are not so many."""
    ids = [token for prompt in prompts(400) for token in prompt]
    if len(ids) < tokens:
        raise EngineError(f"the evaluation set has {len(ids)} tokens, not {tokens}")
    return ids[:tokens]
