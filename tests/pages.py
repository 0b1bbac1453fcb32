"""The Markdown pages of this repository as data: their fenced blocks, links and anchors, read as GitHub reads them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from urllib.parse import unquote

import pilotfish

ROOT = Path(pilotfish.__file__).resolve().parent
DOCS = ROOT / "docs"
NOT_OURS = {"build", "dist", "node_modules", "shared"}

FENCE = re.compile(
    r"^(?P<fence> *`{3,})(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=fence)$", re.M | re.S
)  # in a list: indented
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|\b(?:src|srcset|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.M)


@dataclass(frozen=True)
class Fence:
    """A fenced block. ```` ```python file=ask.py ```` has the language `python` and the options {"file": "ask.py"}."""

    language: str
    text: str
    options: dict[str, str] = field(default_factory=dict)


def pages() -> list[Path]:
    """Every page, the README first."""
    found = [
        path
        for path in ROOT.rglob("*.md")
        if not any(part.startswith(".") or part in NOT_OURS for part in path.relative_to(ROOT).parts)
    ]
    return sorted(found, key=lambda path: (path != ROOT / "README.md", path))


def name(page: Path) -> str:
    """A page as it is called here: `docs/cli.md`."""
    return str(page.relative_to(ROOT))


def fences(page: Path, *languages: str) -> list[Fence]:
    """A page's fenced blocks, of these languages or all; those of a list are indented."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    blocks = [_fence(match["info"], dedent(match["text"])) for match in found]
    return [block for block in blocks if not languages or block.language in languages]


def _fence(info: str, text: str) -> Fence:
    language, *words = info.split() or [""]
    return Fence(language, text, {key: value for key, _, value in (word.partition("=") for word in words)})


def prose(page: Path) -> str:
    """A page without its fenced blocks and comments."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.S)


def links(page: Path) -> list[str]:
    """Where a page leads to, relative or not, in order; code in backticks is none."""
    text = re.sub(r"`[^`\n]*`(?!\])", "", prose(page))
    return [unquote(match[1] or match[2]) for match in LINK.finditer(text)]


def anchors(page: Path) -> set[str]:
    """The anchors GitHub makes of a page's headings."""
    return set(_slugs(HEADING.findall(prose(page))))


def _slugs(headings: list[str]) -> Iterator[str]:
    seen = Counter[str]()
    for heading in headings:
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        yield f"{slug}-{seen[slug]}" if seen[slug] else slug
        seen[slug] += 1


def commands(page: Path) -> list[str]:
    """The shell commands of a page, one line each: `$ ` lines of console blocks, all lines of sh blocks."""
    found: list[str] = []
    for block in fences(page, "sh", "console"):
        lines = block.text.replace("\\\n", " ").splitlines()
        marked = [line[2:] for line in lines if line.startswith("$ ")]
        found += marked if block.language == "console" else [line for line in lines if line.strip()]
    return found
