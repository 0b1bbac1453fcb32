from __future__ import annotations

import io

import pytest
from rich.console import Console

from pilotfish.cli.demonstration import Question, Run, Screen, comparison, figures, first_difference, questions
from pilotfish.cli.requests import Answer
from pilotfish.protocol.errors import ModelError
from pilotfish.protocol.messages import Finished, Summary

ID = "0" * 32
ASKED = [Question("add", "1 + 1?", "2"), Question("code", "def", None)]


def answer(*pieces: str, ms: float = 10.0) -> Answer:
    ids = [ord(piece[0]) for piece in pieces]
    summary = Summary(
        tokens=len(ids), accepted=len(ids) - 1, corrected=1, rounds=1, cloud_rows=5, cloud_steps=1, total_ms=ms
    )
    last = Finished(request=ID, reason="stop", summary=summary)
    return Answer(ID, ids=ids, said=[(piece, "accepted") for piece in pieces], last=last)


def test_questions_are_spread_over_the_families() -> None:
    dozen = questions(12)
    assert len({one.family for one in dozen}) == 12
    assert len(questions(400)) == 400
    assert len({one.prompt for one in questions(400)}) > 390


def test_without_the_file_the_fix_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr("pilotfish.demo.pair.EVAL_FILE", tmp_path / "none")  # type: ignore[operator]
    with pytest.raises(ModelError, match="install pilotfish again"):
        questions(1)


def test_equal_texts_and_where_others_part() -> None:
    one = Run("exact", [answer("2"), answer("a", "b", "c")])
    assert first_difference(ASKED, one, Run("cloud_only", [answer("2"), answer("a", "b", "c")])) is None
    other = Run("cloud_only", [answer("2"), answer("a", "x", "c")])
    assert first_difference(ASKED, one, other) == "'def', token 1: 'bc' (exact) against 'xc' (cloud_only)"
    shorter = Run("cloud_only", [answer("2"), answer("a")])
    assert first_difference(ASKED, one, shorter) == "'def', token 1: 'bc' (exact) against '' (cloud_only)"


def test_figures_are_sums_and_ratios() -> None:
    found = figures(Run("exact", [answer("2"), answer("a", "b", "c", ms=30)]), ASKED)
    assert (found["tokens"], found["right"], found["asked"]) == (4, 1, 1)
    assert (found["acceptance"], found["cloud_steps_per_token"], found["tokens_per_second"]) == (0.5, 0.5, 100)


def test_both_sides_of_the_report() -> None:
    one, other = (figures(Run(mode, [answer("2"), answer("a")]), ASKED) for mode in ("exact", "cloud_only"))
    out = io.StringIO()
    Console(file=out, width=80).print(comparison(one, {**other, "acceptance": None}))
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert ["answers", "right", "1", "of", "1", "1", "of", "1"] in rows
    assert ["acceptance", "0.00", "-"] in rows


def test_off_a_terminal_there_is_a_plain_line_per_answer(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.begin("exact")
    screen.question(Question("add", "1 +\n1?", "2"))
    screen.pieces([("2", "accepted")])
    screen.end(answer("2"), ASKED[0])
    told = capsys.readouterr()
    assert told.out == ""
    assert "1 +⏎1? 2 ✓  1 tokens, 10 ms\n" in told.err
    assert "\x1b" not in told.err
