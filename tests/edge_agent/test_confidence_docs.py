"""The snippets of docs/confidence.md run as they stand there."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import pilotfish
from pilotfish.edge_agent import confidence
from pilotfish.protocol.messages import Sampling

PAGE = Path(pilotfish.__file__).parent / "docs" / "confidence.md"


def snippet(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return str(found)


def test_a_strategy_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    code, module = snippet("python"), ModuleType("your_package")
    assert len(code.strip().splitlines()) <= 20
    exec(compile(code, "your_package", "exec"), module.__dict__)  # noqa: S102  our own docs
    monkeypatch.setitem(__import__("sys").modules, "your_package", module)
    (points,) = tomllib.loads(snippet("toml"))["project"]["entry-points"].items()
    group, entries = points
    found = [EntryPoint(name, value, group) for name, value in entries.items()]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found if group == confidence.GROUP else [])
    confidence._installed.cache_clear()
    try:
        row = np.array([4, 0, 0, 1], np.float32)
        own = confidence.strategy("halves")
        assert own.score(row, 0, 7, Sampling()) == pytest.approx(1 / (1 + np.exp(-3) + np.exp(-4)))
        ensemble = confidence.strategy("ensemble")
        assert isinstance(ensemble, confidence.Ensemble)
        assert own.name in [member.name for member in ensemble.members]
    finally:
        confidence._installed.cache_clear()


def test_the_page_names_every_strategy() -> None:
    text = PAGE.read_text(encoding="utf-8")
    names = [kind.name for kind in confidence.BUILT_IN] + [confidence.Ensemble.name]
    assert all(f"`{name}`" in text for name in names)
