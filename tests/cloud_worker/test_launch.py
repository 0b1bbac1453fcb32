"""From settings to what a worker opens."""

from __future__ import annotations

import pytest

from pilotfish.cloud_worker.launch import worker_spec
from pilotfish.protocol.settings import load


@pytest.mark.parametrize("kept", [True, False])
def test_without_kv_reuse_an_engine_keeps_neither_sessions_nor_prefixes(kept: bool) -> None:
    """The ablation `no_kv_cache` is this one setting."""
    engine = worker_spec(load({"engine": "fake", "kv_reuse": kept}, environ={}), "redis://nowhere").engine
    assert (engine.resident, engine.prefix_cache) == (kept, kept)
