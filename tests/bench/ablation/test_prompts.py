"""The evaluation set, and a user's own prompts: a malformed line is named by its number."""

from __future__ import annotations

from pathlib import Path

import pytest

from pilotfish.bench.ablation.prompts import choose, evaluation_file, read
from pilotfish.protocol.errors import UsageError


def file(folder: Path, *lines: str) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_evaluation_set_is_asked_family_by_family_in_turn() -> None:
    chosen = choose(None, 2, 5)
    assert len(chosen.asked) == 2 * 19
    assert len({one.family for one in chosen.asked[:19]}) == 19
    assert all(one.raw == (one.family == "code") for one in chosen.asked)
    assert chosen.source["with_answer"] == 36


def test_lessons_are_prompts_that_are_not_asked() -> None:
    chosen = choose(None, 2, 5)
    assert len(chosen.lessons) == 5
    assert not set(chosen.lessons) & set(chosen.asked)


def test_where_all_is_asked_lessons_have_other_operands() -> None:
    chosen = choose(None, None, 7)
    assert (len(chosen.asked), len(chosen.lessons)) == (400, 7)
    assert not {one.prompt for one in chosen.lessons} & {one.prompt for one in read(evaluation_file())}
    assert not chosen.source["lessons_are_asked_too"]


def test_own_prompts_work_the_same_way(tmp_path: Path) -> None:
    own = file(tmp_path, '{"prompt": "1+1?", "answer": "2", "family": "sum"}', "", '{"prompt": "go on", "raw": true}')
    first, second = choose(own, None, 0).asked
    assert (first.number, first.answer, first.family, first.raw) == (1, "2", "sum", False)
    assert (second.number, second.answer, second.raw) == (3, None, True)


def test_it_is_told_when_lessons_had_to_be_asked_as_well(tmp_path: Path) -> None:
    chosen = choose(file(tmp_path, '{"prompt": "1+1?"}'), None, 3)
    assert chosen.lessons == chosen.asked
    assert chosen.source["lessons_are_asked_too"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2 is no JSON object: Expecting property name .* at character 2"),
        ("[1]", "line 2 is no JSON object"),
        ('{"answer": "2"}', "line 2 has no prompt"),
        ('{"prompt": "  "}', "line 2 has no prompt"),
        ('{"prompt": "a", "answer": 2}', "line 2 has an answer that is no text"),
        ('{"prompt": "a", "family": 2}', "line 2 has a family that is no text"),
        ('{"prompt": "a", "raw": "yes"}', "line 2 has a raw"),
        ('{"prompt": "a", "expected": "b"}', "line 2 has a field 'expected'"),
        ('{"prompt": "a \\ud83d"}', "line 2 has half a surrogate pair"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, line: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        read(file(tmp_path, '{"prompt": "fine"}', line))


def test_lines_are_those_an_editor_counts(tmp_path: Path) -> None:
    """A text may hold line breaks of Unicode as they are; Windows adds a mark at the start and CR to lines."""
    odd = "one\u2028two\x85three"
    path = file(tmp_path, f'\ufeff{{"prompt": "{odd}"}}\r', '{"prompt": "four"}\r', "{")
    with pytest.raises(UsageError, match="line 3 is no JSON object"):
        read(path)
    path.write_bytes(path.read_bytes().removesuffix(b"{\n"))
    assert [(one.number, one.prompt) for one in read(path)] == [(1, odd), (2, "four")]


def test_a_file_without_prompts_or_none_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no prompts"):
        read(file(tmp_path, ""))
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "nowhere.jsonl")
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(UsageError, match="not UTF-8"):
        read(tmp_path / "latin")
