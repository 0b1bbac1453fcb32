"""Where the demo pair is: the two model folders of this package, and their GGUF files, made at first use.

The only module of the demo that the rest of the project reads. Needs numpy and gguf, never torch.
"""

from __future__ import annotations

import os
from pathlib import Path

from pilotfish.demo.convert import ensure_gguf

MODELS_DIR = Path(__file__).parent / "models"
TARGET_DIR = MODELS_DIR / "target"
DRAFT_DIR = MODELS_DIR / "draft"
EVAL_FILE = Path(__file__).parent / "eval.jsonl"


def cache_dir() -> Path:
    """PILOTFISH_CACHE_DIR if set, else `pilotfish` below the user's cache folder."""
    chosen = os.environ.get("PILOTFISH_CACHE_DIR")
    return Path(os.path.expanduser(chosen or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "pilotfish")))


def fetched_dir(chosen: Path | None) -> Path:
    """Where models from a hub are kept: below the cache folder chosen, else below the usual one."""
    return (chosen or cache_dir()) / "models"


def target_gguf(kind: str = "f32") -> Path:
    """The target as llama.cpp loads it, converted at first use (about a second)."""
    return ensure_gguf(TARGET_DIR, cache_dir() / "demo" / f"target-{kind}.gguf", kind)


def draft_gguf(kind: str = "f32") -> Path:
    """The draft as llama.cpp loads it, converted at first use."""
    return ensure_gguf(DRAFT_DIR, cache_dir() / "demo" / f"draft-{kind}.gguf", kind)
