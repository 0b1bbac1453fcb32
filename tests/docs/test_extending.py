"""The examples of docs/extending.md, imported as they stand there and put to work."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from contracts import verifier as contract
from rigs import PROMPT, agent, draws, text_of, worker

from pages import DOCS, fences
from pilotfish.cloud_worker.engines.base import Verifier
from pilotfish.cloud_worker.engines.fake import fake_target
from pilotfish.cloud_worker.engines.spec import EngineSpec, open_verifier
from pilotfish.cloud_worker.worker_process import WorkerSpec, run
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.edge_agent.task import Task
from pilotfish.edge_agent.tokenizer import ByteTokenizer
from pilotfish.protocol.errors import ModelError
from pilotfish.protocol.messages import Sampling

PAGE = DOCS / "extending.md"
WARM = Sampling(temperature=1.0, seed=3)
SPEC = EngineSpec("bigrams", "", context=512, draft_max=8)
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Import an example by its file's name; child processes find it too, as an installed package."""
    blocks = {block.options["file"]: block for block in fences(PAGE, "python")}
    (entry_points,) = fences(PAGE, "toml")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    info = tmp_path / "examples-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: examples\nVersion: 1\n")
    group, line = entry_points.text.strip().splitlines()
    name, _, value = line.partition(" = ")
    (info / "entry_points.txt").write_text(f"[{group.split(chr(34))[1]}]\n{name} = {value.strip(chr(34))}\n")

    def loaded(module: str) -> ModuleType:
        (tmp_path / f"{module}.py").write_text(blocks[f"{module}.py"].text)
        importlib.invalidate_caches()
        return importlib.import_module(module)

    yield loaded
    for block in blocks:
        sys.modules.pop(block.removesuffix(".py"), None)


async def test_a_drafter_of_ones_own_changes_nothing_but_the_speed(redis_url: str, load: Load) -> None:
    async with worker(redis_url):
        running = await load("lookup").open_agent(redis_url, ByteTokenizer())
        await running.start()
        try:
            text, generation = await text_of(running, Task(PROMPT, sampling=WARM, max_tokens=30, drafting="always"))
        finally:
            await running.stop()
    assert text == draws(PROMPT, 30, WARM)
    assert generation.summary().drafted > 0


def test_prompt_lookup_copies(load: Load) -> None:
    drafter = load("lookup").PromptLookup(256)
    drafted = drafter.draft("s", list(b"a fish, a fi"), 3, Sampling())
    assert (bytes(drafted.ids), drafted.confidences) == (b"sh,", [0.8] * 3)


@pytest.fixture
def bigrams(load: Load) -> Verifier:
    load("bigrams")
    engine, vocabulary = open_verifier(SPEC)
    assert len(vocabulary) == engine.info.vocab_size
    return engine


SERVED = [check for check in contract.CHECKS if check is not contract.check_logprobs]  # it tells none


@pytest.mark.parametrize("check", SERVED, ids=lambda check: check.__name__)
def test_the_example_engine_keeps_the_contract(bigrams: Verifier, check: Callable[[Verifier], None]) -> None:
    check(bigrams)


@pytest.mark.parametrize("sampling", contract.SAMPLINGS.values(), ids=contract.SAMPLINGS)
@pytest.mark.parametrize("check", contract.SAMPLED_CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_it_at(bigrams: Verifier, check: Callable[[Verifier, Sampling], None], sampling: Sampling) -> None:
    if check is contract.check_stop_ids and not sampling.temperature:
        return  # a table without noise repeats itself at once, and that check needs a text that does not
    check(bigrams, sampling)


async def test_a_worker_serves_it_by_its_name(redis_url: str, load: Load) -> None:
    load("bigrams")
    started = asyncio.Event()
    serving = asyncio.create_task(run(WorkerSpec(redis_url, SPEC, name="w1"), ready=lambda *_: started.set()))
    try:
        await asyncio.wait_for(started.wait(), 30)
        async with agent(redis_url) as running:
            text, _ = await text_of(running, Task(tuple(b"the "), "cloud_only", max_tokens=12))
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    assert bytes(text).decode().isascii()
    assert len(text) == 12


def test_an_engine_nobody_installed_is_told() -> None:
    with pytest.raises(ModelError, match="install the package"):
        open_verifier(EngineSpec("tensorrt", ""))


async def test_a_transport_without_redis(load: Load) -> None:
    drafter = FakeDrafter(fake_target, alpha=0.8)

    async def draft(
        session: str, ids: Sequence[int], k: int, sampling: Sampling, stop_ids: Collection[int], proceed: Any
    ) -> Any:
        return drafter.draft(session, ids, k, sampling, stop_ids, proceed)

    task = Task(PROMPT, sampling=WARM, max_tokens=40, drafting="fixed", draft_tokens=4)
    text, summary = await load("direct").generate(EngineSpec("fake", ""), task, draft)
    assert text == draws(PROMPT, 40, WARM)
    assert summary.accepted > 10
