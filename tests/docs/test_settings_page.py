"""docs/settings.md: its table is that of the settings, its advice leaves none out, its example loads."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from pages import DOCS, ROOT, fences
from pilotfish.protocol.settings import Settings, load

PAGE = DOCS / "settings.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_table_is_not_stale() -> None:
    spec = importlib.util.spec_from_file_location("settings_table", ROOT / "tools" / "settings_table.py")
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.renewed(TEXT) == TEXT, "stale: python tools/settings_table.py"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_there_is_advice_on_every_setting(name: str) -> None:
    advice = TEXT.partition("<!-- written by")[0]
    assert re.search(rf"`{name}`", advice), f"docs/settings.md does not say how to choose {name}"


def test_settings_it_names_exist() -> None:
    named = set(re.findall(r"(?m)^\| `(\w+)` \|", TEXT))
    assert named == set(Settings.model_fields)


def test_its_example_file_loads(tmp_path: Path) -> None:
    (example,) = fences(PAGE, "toml")
    file = tmp_path / "pilotfish.toml"
    file.write_text(example.text)
    settings = load(config=file, environ={})
    assert settings.mode == "gated"
    assert settings.origins()["max_disagreement"] == f"file {file}"
