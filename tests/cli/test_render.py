from __future__ import annotations

import io

import pytest
from rich.console import Console

from pilotfish.cli.render import STYLES, acceptance, as_json, legend, summary_line, traced, visible
from pilotfish.protocol.messages import Summary

FULL = Summary(
    tokens=42, accepted=30, corrected=8, continued=4, drafted=50, rounds=9, cloud_rows=55, cloud_steps=9, seed=7,
    first_token_ms=14.2, total_ms=117.9,
)  # fmt: skip


def test_the_summary_is_one_line() -> None:
    assert summary_line(FULL) == (
        "42 tokens: 30 accepted, 8 corrected, 4 continued · acceptance 0.79 · 9 rounds · "
        "1.3 rows and 0.21 steps per token · 118 ms (first 14 ms) · seed 7"
    )


def test_what_did_not_happen_is_left_out() -> None:
    alone = Summary(tokens=1, local=1, seed=3, total_ms=5, first_token_ms=5)
    assert summary_line(alone) == "1 token: 1 local · 5 ms (first 5 ms) · seed 3"


def test_trouble_is_told() -> None:
    line = summary_line(FULL.model_copy(update={"resends": 1, "degraded": True, "rounds": 1}))
    assert "1 round ·" in line
    assert "1 resend · the cloud was lost for a while" in line


def test_acceptance_is_of_the_drafts_that_were_judged() -> None:
    assert acceptance(FULL) == pytest.approx(30 / 38)
    assert acceptance(Summary(continued=3)) is None
    assert as_json(FULL)["acceptance"] == acceptance(FULL)


def test_a_text_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b[31m\tb\n\x07\x7f") == "a␛[31m\tb\n␇␡"


def test_every_origin_has_an_attribute_of_its_own_besides_its_colour() -> None:
    attributes = [" ".join(word for word in style.split() if "#" not in word) for style in STYLES.values()]
    assert len(set(attributes)) == len(STYLES)


def test_a_trace_is_the_text_itself() -> None:
    text = traced([("42 ", "accepted"), ("[b]is[/b]", "corrected"), (" it", "local")])
    assert text.plain == "42 [b]is[/b] it"
    assert [str(span.style) for span in text.spans] == [STYLES["accepted"], STYLES["corrected"], STYLES["local"]]
    out = io.StringIO()
    Console(file=out, force_terminal=False).print(text, end="")
    assert out.getvalue() == text.plain


def test_the_legend_names_every_origin() -> None:
    assert legend().plain == "trace: accepted  corrected  continued  local"
