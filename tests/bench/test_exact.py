"""`bench exact` finds nothing where nothing is wrong, and finds a worker that disagrees: a benchmark that can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pilotfish.bench import exact, exact_engine, near_tie
from pilotfish.bench.exact_compare import Item, Tally, compare_all, first_difference
from pilotfish.bench.exact_engine import SETTINGS, Outcome, Pair
from pilotfish.bench.sides import agent, worker
from pilotfish.cloud_worker.engines.fake import VOCAB, fake_target
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.cloud_worker.worker_process import WorkerSpec
from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.edge_agent.tokenizer import ByteTokenizer
from pilotfish.protocol.messages import Sampling

SAMPLING = Sampling(temperature=1.0)
ITEMS = [Item(number, tuple(b"prompt %d" % number), 40) for number in range(24)]


@asynccontextmanager
async def fleet_of(redis_url: str, *switches: str) -> AsyncIterator[Agent]:
    """One worker with the fake engine for each of `switches`, and an agent."""
    async with AsyncExitStack() as stack:
        for number, switch in enumerate(switches):
            spec = WorkerSpec(redis_url, EngineSpec("fake", switch), name=f"w{number}")
            await stack.enter_async_context(worker(spec))
        drafter = FakeDrafter(fake_target, alpha=0.7, vocab_size=VOCAB)
        yield await stack.enter_async_context(agent(redis_url, drafter, lambda _: ByteTokenizer()))


async def compared(redis_url: str, *switches: str) -> Tally:
    async with fleet_of(redis_url, *switches) as running:
        return await compare_all(running, ITEMS, "T=1", SAMPLING)


def outcome(tally: Tally, *, explained: bool = False) -> Outcome:
    judged = [{"explained": explained} for _ in tally.differences]
    return Outcome("fake", {"T=1": tally}, near_tie.Noise(0, 0.0, 0.0), judged)


@pytest.mark.slow
async def test_honest_workers_do_not_differ(redis_url: str) -> None:
    tally = await compared(redis_url, "", "")
    assert tally.differences == []
    assert tally.tokens == 40 * len(ITEMS)
    assert tally.costs["exact"]["accepted"] > 0
    assert {one.name: one.met for one in exact.targets([outcome(tally)])} == {
        "tokens": None, "unexplained": None, "explained": None,
    }  # fmt: skip


@pytest.mark.slow
async def test_a_worker_that_disagrees_is_found_and_the_comparison_goes_on(redis_url: str) -> None:
    tally = await compared(redis_url, "", "flip_rate=0.05,flip_seed=3")
    assert len({difference.item for difference in tally.differences}) > 1
    assert tally.tokens == 40 * len(ITEMS), "behind a difference the rest is compared too"
    for found in tally.differences:
        drawn = {found.exact, found.cloud}
        assert fake_target(found.prefix, len(found.prefix), found.sampling) in drawn, "up to there both were the target"
    assert {one.name: one.met for one in exact.targets([outcome(tally)])}["unexplained"] is False


def test_an_explained_difference_is_counted_apart() -> None:
    tally = Tally(tokens=100_000)
    some = outcome(tally)
    some.judged = [{"explained": True}]
    assert {one.name: one.met for one in exact.targets([some])} == {
        "tokens": True, "unexplained": True, "explained": True,
    }  # fmt: skip
    some.judged *= 6
    assert {one.name: one.met for one in exact.targets([some])}["explained"] is False


@pytest.mark.parametrize(
    ("one", "other", "at"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None)]
)
def test_the_first_difference_may_be_an_end(one: list[int], other: list[int], at: int | None) -> None:
    assert first_difference(one, other) == at


# --- on real engines -----------------------------------------------------------------------------------------


def check_report(report: dict[str, Any], engine: str) -> None:
    found = {one["name"]: one for one in report["targets"]}
    assert list(found) == ["tokens", "unexplained", "explained"]
    figures = report["figures"][engine]
    assert found["unexplained"]["value"] == 0, figures["shown"]
    assert found["tokens"]["value"] == figures["tokens"] > 500
    assert found["tokens"]["met"] is None
    assert list(figures["settings"]) == list(SETTINGS)
    for setting in figures["settings"].values():
        assert setting["exact"]["rounds"] > setting["cloud_only"]["rounds"]
        assert setting["exact"]["resends"] == 0
    assert figures["noise"]["rows"] > 0
    assert report["conditions"]["dtype"] == "float32"


@pytest.mark.slow
@pytest.mark.llamacpp
def test_llamacpp_quick(tmp_path: Path) -> None:
    from contracts.tiny_gguf import write_tiny_gguf

    from pilotfish.demo.pair import EVAL_FILE

    target, draft = write_tiny_gguf(tmp_path / "target.gguf"), write_tiny_gguf(tmp_path / "draft.gguf", seed=1)
    report = exact.run(quick=True, pair=Pair(tmp_path, target, draft, EVAL_FILE), engines=("llamacpp",))
    check_report(report.as_dict(), "llamacpp")


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.timeout(600)
def test_vllm_quick() -> None:
    """In a process of its own: the drafter is llama.cpp, and this one may have loaded vLLM."""
    code = (
        "import json; from pilotfish.bench import exact; "
        "print(json.dumps(exact.run(quick=True, engines=('vllm',)).as_dict()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    check_report(json.loads(ran.stdout.splitlines()[-1]), "vllm")


def test_the_engine_gets_cores_of_its_own() -> None:
    from pilotfish.bench.sides import edge_cores, engine_cores

    assert not set(edge_cores()) & set(engine_cores())
    spec = exact_engine.engine_spec("llamacpp", Pair(Path("t"), Path("t.gguf"), Path("d.gguf"), Path("q")))
    assert spec.dtype == "float32"
    assert spec.cores == ",".join(map(str, engine_cores()))
