"""A target spread over two devices (here: two processes of one CPU each): the contract of every verifier holds."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from contracts import verifier as contract
from contracts.tiny_hf import write_tiny_model
from rigs import children, engine_child

from helpers import wait_until
from pilotfish.cloud_worker.engine_process import EngineProcess
from pilotfish.cloud_worker.engines import vllm_args
from pilotfish.cloud_worker.engines.base import VerifyRequest
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.cloud_worker.engines.vllm_engine import VllmVerifier
from pilotfish.demo import pair
from pilotfish.protocol.errors import EngineError, ModelError
from pilotfish.protocol.messages import Sampling

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]
TWO = '{"tensor_parallel_size": 2}'
LIMITS = {"context": 256, "draft_max": 8, "max_sessions": 8, "threads": 2, "kv_blocks": 64}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("target"), vocab=512, context=256)


@pytest.fixture(scope="module")
def opened(model_dir: Path) -> Iterator[VllmVerifier]:
    verifier = VllmVerifier(model_dir, engine_args=TWO, **LIMITS)  # type: ignore[arg-type]
    yield verifier
    verifier.close()


@pytest.fixture
def engine(opened: VllmVerifier) -> Iterator[VllmVerifier]:
    opened.reset()
    yield opened
    assert not opened.busy


def ranks(engine: VllmVerifier) -> list[BaseProcess]:
    return [worker.proc for worker in engine._core.model_executor.workers]


class TestContract(contract.Contract):
    """On this engine."""


@pytest.mark.parametrize("drafts", contract.DRAFTS.values(), ids=contract.DRAFTS)
def test_contract_drafts_change_nothing(engine: VllmVerifier, drafts: contract.Drafts) -> None:
    contract.check_drafts_change_nothing(engine, Sampling(temperature=0.8, seed=4), drafts)


def test_it_is_a_target_of_its_own(engine: VllmVerifier, model_dir: Path) -> None:
    """Sums over two devices are other numbers than those of one."""
    alone = VllmVerifier(model_dir, **LIMITS)  # type: ignore[arg-type]
    alone.close()
    assert alone.info.fingerprint != engine.info.fingerprint
    assert alone.info.vocab_size == engine.info.vocab_size


def test_what_a_process_group_is_sent_does_not_end_the_ranks(engine: VllmVerifier) -> None:
    """Ctrl-C and a service manager's SIGTERM reach everyone: the worker drains first, and needs its engine for that."""
    assert len(ranks(engine)) == 2
    for rank in ranks(engine):
        for sent in (signal.SIGINT, signal.SIGTERM):
            os.kill(rank.pid or 0, sent)
    time.sleep(0.2)
    assert contract.plain(engine, [1, 2, 3], 4, Sampling())


async def test_an_engine_that_is_killed_takes_its_ranks_with_it() -> None:
    """Or their memory would be missing when the next one starts."""
    engine = EngineProcess(EngineSpec("vllm", str(pair.TARGET_DIR), context=256, draft_max=4, engine_args=TWO))
    await engine.start()
    try:
        alive = rank_pids(engine_child())
        assert len(alive) == 2
        os.kill(engine_child(), signal.SIGKILL)
        await wait_until(lambda: gone(alive), "the ranks to end", 2.0)
    finally:
        await engine.stop()


def rank_pids(engine: int) -> list[int]:
    return [pid for pid in children(engine) if b"VLLM" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def gone(pids: list[int]) -> bool:
    """Ended; one that nobody has waited for has no memory either."""
    states = [Path(f"/proc/{pid}/stat") for pid in pids]
    return all(not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z" for state in states)


@pytest.mark.parametrize("count", ["0", '"two"', "-1", "1.5"])
def test_no_number_of_devices_is_refused(count: str) -> None:
    with pytest.raises(ModelError, match="number of devices"):
        vllm_args.ranks(vllm_args.read(f'{{"tensor_parallel_size": {count}}}'))


def test_a_rank_that_dies_is_an_engine_error_and_leaves_nobody(opened: VllmVerifier) -> None:
    """The last test here: the engine of all the others is lost with it."""
    first, second = ranks(opened)
    opened.submit(VerifyRequest("r", "s", [1, 2, 3], [], continue_tokens=3))
    os.kill(first.pid or 0, signal.SIGKILL)
    with pytest.raises(EngineError, match="restart the engine"):
        contract.run(opened)
    opened.close()
    second.join(20)
    assert not second.is_alive()
