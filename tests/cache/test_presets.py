from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

import pilotfish
from pilotfish.cache.hub_name import hub_name
from pilotfish.cache.presets import PRESETS, with_preset
from pilotfish.protocol import settings
from pilotfish.protocol.settings import Settings, load

PAGE = (Path(pilotfish.__file__).parent / "docs/models.md").read_text()


def test_the_setting_takes_the_presets_there_are() -> None:
    assert get_args(settings.Preset) == tuple(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_a_draft_file_and_a_target_for_each_engine(name: str) -> None:
    pair = PRESETS[name]
    assert hub_name(pair.draft).file.endswith(".gguf")
    assert hub_name(pair.target_llamacpp).file.endswith(".gguf")
    assert hub_name(pair.target_vllm).file == ""


@pytest.mark.parametrize("name", PRESETS)
def test_the_page_shows_each_preset_as_it_is(name: str) -> None:
    (row,) = re.findall(rf"(?m)^\| `{re.escape(name)}` \|.*$", PAGE)
    pair = PRESETS[name]
    assert [f"`{part}`" in row for part in (pair.draft, pair.target_vllm, pair.target_llamacpp)] == [True] * 3


def test_a_preset_fills_in_what_nobody_chose() -> None:
    chosen = load({"preset": "qwen3-8b", "dtype": "float16", "draft_model": "mine.gguf"}, environ={})
    filled = with_preset(chosen, "vllm")
    assert filled.draft_model == "mine.gguf"
    assert filled.dtype == "float16"
    assert filled.target_model == PRESETS["qwen3-8b"].target_vllm
    assert with_preset(chosen, "llamacpp").target_model == PRESETS["qwen3-8b"].target_llamacpp
    assert (filled.max_sessions, with_preset(chosen, "llamacpp").max_sessions) == (Settings().max_sessions, 4)


def test_without_a_preset_nothing_changes() -> None:
    assert with_preset(Settings()) == Settings()
