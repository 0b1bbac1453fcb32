from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pilotfish.edge_agent.http.stop_strings import StopStrings

letters = st.text("ab", max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


def fed(pieces: list[str], wanted: list[str]) -> tuple[str, bool]:
    cut = StopStrings(wanted)
    said = "".join(cut.feed(piece) for piece in pieces)
    return said + cut.end(), cut.stopped


def by_definition(text: str, wanted: list[str]) -> tuple[str, bool]:
    """Letter by letter: the first stop string that is complete ends the text; of several, the longest."""
    for end in range(1, len(text) + 1):
        if done := [stop for stop in wanted if text[:end].endswith(stop)]:
            return text[: end - max(map(len, done))], True
    return text, False


@given(st.lists(letters, max_size=6), stops)
def test_the_text_ends_where_the_first_stop_string_is_complete_however_it_was_cut(
    pieces: list[str], wanted: list[str]
) -> None:
    assert fed(pieces, wanted) == by_definition("".join(pieces), wanted)


@given(st.lists(letters, max_size=6), stops)
def test_what_is_given_out_is_never_taken_back(pieces: list[str], wanted: list[str]) -> None:
    final, _ = by_definition("".join(pieces), wanted)
    cut, said = StopStrings(wanted), ""
    for piece in pieces:
        said += cut.feed(piece)
        assert final.startswith(said)


def test_only_what_may_still_become_a_stop_string_is_held_back() -> None:
    cut = StopStrings(["</end>"])
    assert cut.feed("a </e") == "a "
    assert cut.feed("m> b <") == "</em> b "
    assert cut.end() == "<"
