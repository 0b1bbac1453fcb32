"""Which model, in which engine, with which numbers: what must be equal for one agent's KV state to mean another's.

Read from the file and the installed package; llama.cpp itself is not loaded.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from pilotfish.cache.llama_library import library_version, model_digest


class ModelBuild(BaseModel):
    """`weights` is the GGUF file's digest, `kv` the number type of the cache, `engine` name and version."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    weights: str
    kv: str
    engine: str

    @classmethod
    def of(cls, path: Path, kv: str) -> Self:
        """The build that opens this GGUF file here. Raises ModelError if there is none."""
        return cls(weights=model_digest(path), kv=kv, engine=f"llama-cpp-python {library_version()}")

    @property
    def fingerprint(self) -> str:
        """Of all fields, hex."""
        return hashlib.sha256(f"{self.engine}|{self.kv}|{self.weights}".encode()).hexdigest()

    def difference(self, other: ModelBuild) -> str:
        """The first field that differs, with both values, as a sentence's part; "" if none does."""
        for name in type(self).model_fields:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name} is {_short(theirs)} there and {_short(ours)} here"
        return ""


def _short(value: str) -> str:
    return value[:12] if len(value) == 64 else value
