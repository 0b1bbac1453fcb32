"""docs/tutorial.md from its first command to its last, with the demo pair on llama.cpp."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from consoles import Reader, missing, pattern, steps
from pages import DOCS, Fence, fences
from pilotfish.cli.redis_server import find_program, free_port

PAGE = DOCS / "tutorial.md"
PORTS = ("8787", "6399")  # the page's own, which may be taken here
RUN_SECONDS = 150.0  # about 40 on two idle cores


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """Somebody with an empty home, an empty cache and nothing set."""
    ours = ("PILOTFISH_", "REDIS_URL", "XDG_", "FORCE_COLOR")
    here = {name: "" for name in os.environ if name.startswith(ours)}
    env = {
        **here, "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path), "PILOTFISH_CACHE_DIR": str(tmp_path / "cache"),
        "PILOTFISH_ENGINE": "llamacpp", "COLUMNS": "120",
    }  # fmt: skip
    one = Reader(tmp_path, env)
    (tmp_path / ".bin/redis-server").symlink_to(find_program())
    yield one
    one.leave()


@pytest.mark.llamacpp
@pytest.mark.slow
def test_the_tutorial_works_from_beginning_to_end(reader: Reader) -> None:
    started = time.monotonic()
    ports = {port: str(free_port()) for port in PORTS}
    reader.env["PILOTFISH_SERVE_PORT"] = ports["8787"]
    for block in fences(PAGE):
        text = block.text
        for port, other in ports.items():
            text = text.replace(port, other)
        reader.read(Fence(block.language, text, block.options))
    reader.leave()
    assert time.monotonic() - started < RUN_SECONDS


def test_the_page_runs_what_it_shows() -> None:
    blocks = fences(PAGE)
    assert all(block.language == "console" or "file" in block.options for block in blocks), "a block that nobody runs"
    assert sum(len(steps(block)) for block in blocks if block.language == "console") > 20


@pytest.mark.parametrize(
    ("shown", "printed", "fits"),
    [
        ("11 tokens: 10 accepted", "7 tokens: 6 accepted", True),
        ("11 tokens: 10 accepted", "7 tokens: 6 corrected", False),
        ("target 595104d719ef423c", "target 0a1b", True),
        ("process 611 (…)", "process 7 (over there)", True),
        ("42", "43", False),
        ("0.96   -", "0.91 -", True),
    ],
)
def test_what_a_shown_line_allows(shown: str, printed: str, fits: bool) -> None:
    assert bool(pattern(shown).fullmatch(printed)) == fits


def test_lines_may_be_left_out_but_not_change_places() -> None:
    assert missing(["a", "c"], "a\nb\nc") is None
    assert missing(["c", "a"], "a\nb\nc") == "a"
