"""What a device does not prefill twice, through the drafter and through an agent opened from settings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from contracts.tiny_gguf import VOCAB, write_tiny_gguf

from helpers import wait_until_sync
from pilotfish.cache.edge_cache import EdgeCache
from pilotfish.edge_agent.drafters.llamacpp import LlamaCppDrafter
from pilotfish.edge_agent.launch import open_agent, open_drafter, states_path
from pilotfish.edge_agent.task import Task
from pilotfish.protocol import metrics
from pilotfish.protocol.errors import EngineError
from pilotfish.protocol.messages import Sampling
from pilotfish.protocol.settings import Settings

pytestmark = pytest.mark.llamacpp
WARM = Sampling(temperature=0.8, top_k=50, seed=4)
PROMPT = [(7 * i + i // 3) % VOCAB for i in range(90)]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


def settings_of(model_file: Path, tmp_path: Path, **more: float) -> Settings:
    return Settings(draft_model=model_file, context=512, draft_threads=1, cache_dir=tmp_path, **more)


def saved_tokens() -> float:
    return metrics.REGISTRY.get_sample_value("pilotfish_edge_cache_saved_tokens_total") or 0.0


def test_turns_regenerations_and_system_prompts_are_prefilled_once(model_file: Path) -> None:
    with LlamaCppDrafter(model_file, context=512, cache=EdgeCache(10**8)) as drafter:
        first = drafter.draft("turn 1", PROMPT, 12, WARM)
        assert first.prefilled == len(PROMPT)
        drafter.close_session("turn 1")
        again = drafter.draft("regeneration", PROMPT, 12, WARM)
        assert (again.ids, again.prefilled) == (first.ids, 1)
        drafter.close_session("regeneration")
        turn = [*PROMPT, *first.ids, 5, 6, 7]
        assert drafter.draft("turn 2", turn, 4, WARM).prefilled == 4  # the last id drafted was never evaluated
        assert drafter.draft("same start", [*PROMPT[:50], *range(40)], 4, WARM).prefilled == 40


def test_more_sessions_than_sequences_take_turns_without_prefilling_again(model_file: Path) -> None:
    texts = {session: [*PROMPT, i, *PROMPT] for i, session in enumerate("abc")}
    with LlamaCppDrafter(model_file, context=512, sessions=2, cache=EdgeCache(10**8)) as drafter:
        drafts = {session: drafter.draft(session, ids, 4, WARM).ids for session, ids in texts.items()}
        for session, ids in texts.items():
            assert drafter.draft(session, [*ids, *drafts[session]], 4, WARM).prefilled == 1


def test_a_restarted_drafter_goes_on_where_it_was_stopped(model_file: Path, tmp_path: Path) -> None:
    settings = settings_of(model_file, tmp_path, edge_cache_disk_mb=10)
    with open_drafter(settings) as before:
        first = before.draft("closed", PROMPT, 8, WARM)
        before.close_session("closed")
        before.draft("open when it stops", PROMPT[::-1], 8, WARM)
    with open_drafter(settings) as after:
        again = after.draft("a", PROMPT, 8, WARM)
        assert (again.ids, again.prefilled) == (first.ids, 1)
        assert after.draft("b", PROMPT[::-1], 8, WARM).prefilled == 1
    assert len(list(states_path(settings).iterdir())) == 2


def test_without_the_disk_tier_nothing_is_written(model_file: Path, tmp_path: Path) -> None:
    with open_drafter(settings_of(model_file, tmp_path)) as drafter:
        drafter.draft("a", PROMPT, 4, WARM)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("off", [{"edge_cache_mb": 0}, {"kv_reuse": False}], ids=str)
def test_switched_off_it_is_off(model_file: Path, tmp_path: Path, off: dict[str, float]) -> None:
    before = saved_tokens()
    with open_drafter(settings_of(model_file, tmp_path, edge_cache_disk_mb=10, **off)) as drafter:
        for session in ("a", "b"):
            assert drafter.draft(session, PROMPT, 4, WARM).prefilled == len(PROMPT)
            drafter.close_session(session)
    assert list(tmp_path.iterdir()) == []
    assert saved_tokens() == before


def test_without_kv_reuse_every_round_is_computed_anew(model_file: Path, tmp_path: Path) -> None:
    """The draft's own sequence counts: the ablation `no_kv_cache` takes residency away at both ends."""
    with open_drafter(settings_of(model_file, tmp_path)) as kept:
        first = kept.draft("a", PROMPT, 4, WARM)
        second = kept.draft("a", [*PROMPT, *first.ids], 4, WARM)
        assert (first.prefilled, second.prefilled) == (len(PROMPT), 1)
    with open_drafter(settings_of(model_file, tmp_path, kv_reuse=False)) as anew:
        assert anew.draft("a", PROMPT, 4, WARM).ids == first.ids
        again = anew.draft("a", [*PROMPT, *first.ids], 4, WARM)
        assert (again.ids, again.prefilled) == (second.ids, len(PROMPT) + 4)
        assert not anew.prefill("b", PROMPT, 50)  # a prompt that is read in pieces is read once
        assert anew.draft("b", PROMPT, 4, WARM).prefilled == len(PROMPT) - 50


def test_logits_that_cannot_be_drawn_from_are_not_saved(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EdgeCache(10**8)
    with LlamaCppDrafter(model_file, context=512, cache=cache) as drafter:
        with monkeypatch.context() as patch:
            patch.setattr(drafter._context, "decode", lambda rows: np.full((1, VOCAB), np.nan, np.float32))
            with pytest.raises(EngineError, match="logits are unusable"):
                drafter.draft("a", PROMPT, 4, WARM)
        drafter.close_session("a")
        assert cache.statistics.states == 0
        assert drafter.draft("a", PROMPT, 4, WARM).prefilled == len(PROMPT)


@pytest.mark.parametrize("megabytes", [10.0, 0.0])
async def test_an_agents_second_turn_evaluates_the_new_tokens_only(
    model_file: Path, tmp_path: Path, megabytes: float
) -> None:
    agent = await open_agent(settings_of(model_file, tmp_path, edge_cache_mb=megabytes), None)
    before = saved_tokens()
    for prompt in (PROMPT, [*PROMPT, *range(30)]):
        generation = agent.open(Task(tuple(prompt), "edge_only", max_tokens=12))
        assert len([token async for tokens in generation.run() for token in tokens]) == 12
        agent.close(generation)
    await agent.stop()
    assert saved_tokens() - before == (len(PROMPT) if megabytes else 0)


KILLED = """
import signal
from pathlib import Path
from pilotfish.edge_agent.launch import open_drafter
from pilotfish.protocol.messages import Sampling
from pilotfish.protocol.settings import load
drafter = open_drafter(load(environ={}))
drafter.draft("a", list(range(4, 94)), 4, Sampling())
drafter.close_session("a")
signal.pause()
"""


def test_a_killed_agent_finds_its_closed_sessions_again(model_file: Path, tmp_path: Path) -> None:
    settings = settings_of(model_file, tmp_path, edge_cache_disk_mb=10)
    names = ("draft_model", "context", "draft_threads", "cache_dir", "edge_cache_disk_mb")
    lines = [f"{name} = {json.dumps(settings.model_dump(mode='json')[name])}" for name in names]
    (tmp_path / "pilotfish.toml").write_text("\n".join(lines))
    with subprocess.Popen([sys.executable, "-c", KILLED], cwd=tmp_path) as killed:
        try:
            wait_until_sync(lambda: list(tmp_path.glob("kv/*.kv")), "the closed session's state on disk", timeout=30)
        finally:
            killed.kill()
    with open_drafter(settings) as after:
        assert after.draft("b", list(range(4, 94)), 4, Sampling()).prefilled == 1
