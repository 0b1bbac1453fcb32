"""Tokens to text: whatever the text and the stop strings, what comes out is their definition's, and tokens add up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.edge_agent.http.writer import Writer, Written
from pilotfish.edge_agent.task import Task
from pilotfish.edge_agent.tokenizer import ByteTokenizer

PROMPT = (1, 2, 3)
LETTERS = st.text("ab€🐟", max_size=12)


class Reciter(Agent):
    """Writes `script`, one byte a token."""

    script = b""

    def __init__(self) -> None:
        drafter = FakeDrafter(lambda ids, at, _: self.script[(at - len(PROMPT)) % len(self.script)], alpha=1.0)
        super().__init__(drafter, ByteTokenizer(), ())

    def recite(self, script: bytes, stops: list[str], draft_tokens: int) -> tuple[list[Written], Writer]:
        async def write() -> tuple[list[Written], Writer]:
            task = Task(PROMPT, "edge_only", max_tokens=len(script), draft_tokens=draft_tokens)
            writer = Writer(self, task, stops)
            return [new async for new in writer.run()], writer

        self.script = script
        return asyncio.run(write())


@pytest.fixture(scope="module")
def reciter() -> Iterator[Reciter]:
    one = Reciter()
    yield one
    asyncio.run(one.stop())


def by_definition(text: str, stops: list[str]) -> str:
    for end in range(1, len(text) + 1):
        if done := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, done))]
    return text


@settings(max_examples=60)
@given(LETTERS.filter(bool), st.lists(st.text("ab€🐟", min_size=1, max_size=3), max_size=3), st.integers(1, 5))
@example("a€", ["€"], 1)
@example("ab", ["bx"], 4)
def test_the_text_is_that_before_the_first_stop_string(
    reciter: Reciter, text: str, stops: list[str], draft_tokens: int
) -> None:
    parts, writer = reciter.recite(text.encode(), stops, draft_tokens)
    said = "".join(part.text for part in parts)
    wanted = by_definition(text, stops)
    assert said == wanted
    assert writer.finish == ("length" if wanted == text else "stop")
    tokens = [token for part in parts for token in part.tokens]
    assert bytes(token.id for token in tokens) == text.encode()[: len(tokens)]
    assert "".join(token.text for token in tokens).startswith(said) or said == ""
    if wanted == text:
        assert len(tokens) >= len(said.encode())
    assert all(part.text or part.tokens for part in parts), "nothing is said of nothing"


@pytest.mark.parametrize("script", ["€".encode()[:2], b"ab\xe2\x82", b"\xff\xfea"])
def test_bytes_that_are_no_text_are_shown_as_such_and_not_lost(reciter: Reciter, script: bytes) -> None:
    parts, writer = reciter.recite(script, [], 4)
    assert "".join(part.text for part in parts) == script.decode(errors="replace")
    assert [token.id for part in parts for token in part.tokens] == list(script)
    assert writer.summary.tokens == len(script)
