"""vLLM as the ablation `no_kv_cache` opens it. A module of its own: a process holds one engine at a time."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from contracts import verifier as contract
from contracts.tiny_hf import write_tiny_model

from pilotfish.cloud_worker.engines.vllm_engine import VllmVerifier
from pilotfish.protocol.messages import Sampling

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]


def test_every_row_of_every_round_is_computed(tmp_path: Path) -> None:
    """Of a session's next round, and of a prefix another session has computed."""
    model = write_tiny_model(tmp_path / "target", vocab=256, context=256)
    engine = VllmVerifier(
        model, context=256, draft_max=4, max_sessions=4, threads=1, kv_blocks=16, resident=False, prefix_cache=False
    )
    try:
        ids = [7 * n % 200 for n in range(70)]
        first = contract.round_(engine, "one", ids, [], Sampling())
        second = contract.round_(engine, "one", [*ids, *first.draws], [1, 2], Sampling())
        other = contract.round_(engine, "another", ids, [], Sampling())
        assert [event.cached for event in (first, second, other)] == [0, 0, 0]
        assert [event.rows for event in (first, second, other)] == [70, 71 + 2, 70]
        assert (engine.info.block_size, engine.kv_changes()) == (0, [])
    finally:
        engine.close()
