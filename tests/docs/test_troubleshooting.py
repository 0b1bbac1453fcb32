"""Every sentence quoted in docs/troubleshooting.md is one that pilotfish says, and every error code stands there."""

from __future__ import annotations

import ast
import re
from functools import cache
from typing import get_args

import pytest

from pages import DOCS, ROOT
from pilotfish.protocol import errors
from pilotfish.protocol.messages import RefusalCode

PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"``(.+?)``", PAGE)
CODES = dict(re.findall(r"(?m)^\| `(\w+)` \| .* \| (\d+) \|$", PAGE))
ROOMS = ("protocol", "cache", "cli", "edge_agent", "cloud_worker")


@cache
def said() -> list[str]:
    """Every text in the source, what is filled in as …"""
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    return [
        _template(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr)
    ]


def _template(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    parts = node.values if isinstance(node, ast.JoinedStr) else []
    return "".join(_template(part) if isinstance(part, ast.Constant) else "…" for part in parts)


@pytest.mark.parametrize("sentence", QUOTED)
def test_it_is_really_said(sentence: str) -> None:
    stable = [part for part in sentence.strip().split("…") if part.strip()]
    assert max(map(len, stable)) >= 8, "too little of it to recognise"
    allowed = re.compile(".*".join(map(re.escape, (part.strip() for part in sentence.split("…")))))
    assert any(allowed.search(text) for text in said()), f"nothing in the source says {sentence!r}"


def test_there_is_a_lot_of_it() -> None:
    assert len(QUOTED) > 40


def kinds(kind: type[errors.PilotfishError]) -> list[type[errors.PilotfishError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in kinds(child))]


def test_every_error_code_is_explained_with_its_exit_code() -> None:
    ours = [kind for kind in kinds(errors.PilotfishError) if kind.__module__ == errors.__name__]
    assert {kind.code: str(kind.exit_code) for kind in ours} == CODES


def test_every_refusal_is_explained() -> None:
    assert all(f"`{code}`" in PAGE for code in get_args(RefusalCode))
