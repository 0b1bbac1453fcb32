"""An operator's own settings of vLLM: what may be given, what is refused and why, what makes another target."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
from contracts.tiny_hf import write_tiny_model

from pages import DOCS, commands
from pilotfish.cloud_worker.engines import vllm_args
from pilotfish.cloud_worker.engines.base import VerifyRequest
from pilotfish.cloud_worker.launch import worker_spec
from pilotfish.protocol.errors import ModelError
from pilotfish.protocol.settings import load

LMCACHE = '{"kv_transfer_config": {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}}'


def test_nothing_is_nothing() -> None:
    assert vllm_args.read("") == {}
    assert vllm_args.mark({}) == ""


@pytest.mark.parametrize("text", ["[1]", "tensor_parallel_size=2", "3", "null"])
def test_what_is_no_object_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ModelError, match="no JSON object.*quantization"):
        vllm_args.read(text)


@pytest.mark.parametrize("name", sorted(vllm_args.OURS))
def test_what_the_engine_needs_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ModelError, match=f"may not set {name}: .{{20,}} Leave it out"):
        vllm_args.read(f'{{"{name}": 2}}')


def test_other_numbers_are_another_target_and_other_places_are_not() -> None:
    assert vllm_args.mark(vllm_args.read(LMCACHE)) == ""
    fp8 = vllm_args.mark({"quantization": "fp8", "gpu_memory_utilization": 0.5})
    assert fp8 == vllm_args.mark({"quantization": "fp8"}) != vllm_args.mark({"quantization": "awq"})


def test_what_the_docs_give_is_taken() -> None:
    given = [
        re.findall(r"--engine-args '(.*?)'", line) for line in commands(DOCS / "fleet.md") if "--engine-args" in line
    ]
    assert [LMCACHE] in given
    assert all(vllm_args.read(text) for (text,) in given)


def test_only_vllm_has_them() -> None:
    with pytest.raises(ModelError, match="are vLLM's"):
        worker_spec(load({"engine": "fake", "engine_args": "{}"}, environ={}), "redis://127.0.0.1/0")


@pytest.mark.vllm
def test_every_name_we_know_is_one_of_the_installed_vllm() -> None:
    from dataclasses import fields

    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in fields(EngineArgs)}
    assert set(vllm_args.OURS) <= known
    assert known >= vllm_args.NEUTRAL


@pytest.mark.vllm
def test_the_lmcache_of_the_docs_is_a_connector_of_the_installed_vllm() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations, while it loads
        from vllm.config import KVTransferConfig
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    config = KVTransferConfig(**vllm_args.read(LMCACHE)["kv_transfer_config"])
    assert config.kv_connector in KVConnectorFactory._registry
    assert config.is_kv_transfer_instance


@pytest.mark.vllm
def test_a_kv_connector_of_vllms_runs_under_our_scheduler_and_changes_no_draw(tmp_path: Path) -> None:
    """vLLM's example, which keeps blocks in a folder: LMCache itself wants a GPU."""
    model, store = write_tiny_model(tmp_path / "target", vocab=256, context=256), tmp_path / "kv"
    store.mkdir()
    connector = {
        "kv_connector": "ExampleConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(store)},
    }  # fmt: skip
    plain = _written(model, "")
    assert _written(model, json.dumps({"kv_transfer_config": connector})) == plain
    assert any(store.iterdir()), "the connector was given the blocks"


def _written(model: Path, engine_args: str) -> tuple[list[int], str]:
    """Draws of one engine after a prompt of two blocks, and its fingerprint."""
    from pilotfish.cloud_worker.engines.vllm_engine import VllmVerifier

    engine = VllmVerifier(
        model, context=128, draft_max=4, max_sessions=2, threads=1, kv_blocks=64, engine_args=engine_args
    )
    try:
        engine.submit(VerifyRequest("r", "s", list(range(70)), [], continue_tokens=6))
        draws = list[int]()
        while engine.busy:
            draws += [draw for event in engine.step() for draw in event.draws]
        return draws, engine.info.fingerprint
    finally:
        engine.close()


@pytest.mark.vllm
def test_an_argument_reaches_the_engine_and_an_unknown_one_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    from pilotfish.cloud_worker.engines.vllm_engine import VllmVerifier

    model = write_tiny_model(tmp_path_factory.mktemp("target"), vocab=256, context=64)
    limits = {"context": 64, "draft_max": 4, "max_sessions": 2, "threads": 1, "kv_blocks": 64}
    with pytest.raises(ModelError, match="no engine argument spelling_mistake"):
        VllmVerifier(model, engine_args='{"spelling_mistake": 1}', **limits)  # type: ignore[arg-type]
    plain = VllmVerifier(model, **limits)  # type: ignore[arg-type]
    plain_mark = plain.info.fingerprint
    plain.close()
    seeded = VllmVerifier(model, engine_args='{"seed": 7}', **limits)  # type: ignore[arg-type]
    try:
        assert seeded._core.vllm_config.model_config.seed == 7
        assert seeded.info.fingerprint != plain_mark
    finally:
        seeded.close()
