"""docs/comparison.md: whoever is compared has a source, every note is there, and not all ticks are ours."""

from __future__ import annotations

import re

from pages import DOCS

TEXT = (DOCS / "comparison.md").read_text(encoding="utf-8")
TABLES, _, SOURCES = TEXT.partition("## Where our ticks come from")
HEADS = re.findall(r"(?m)^\| \| pilotfish \| (.*) \|$", TABLES)


def rows() -> list[list[str]]:
    cells = [line.strip("| ").split(" | ") for line in TABLES.splitlines() if line.startswith("| ")]
    return [row for row in cells if len(row) > 2 and row[0] and not row[0].startswith("pilotfish")]


def test_everyone_compared_has_a_source() -> None:
    names = {name for head in HEADS for name in re.split(r" \| |, ", head)}
    sources = re.findall(r"(?m)^\| ([\w.-]+) \| .*https://", SOURCES)
    assert {name.removesuffix("'s own") for name in names} == set(sources)


def test_every_note_is_there() -> None:
    digits = "¹²³⁴⁵⁶⁷⁸⁹"
    used = {digits.index(mark) + 1 for mark in TABLES if mark in digits}
    assert used == {int(number) for number in re.findall(r"(?m)^(\d)\. ", SOURCES)}


def test_we_have_empty_boxes_too() -> None:
    ours = [row[1][0] for row in rows() if row[1][0] in "☑☐"]
    assert len(ours) > 25
    assert ours.count("☐") >= len(ours) / 3
