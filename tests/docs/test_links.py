"""Every link of every page leads somewhere, and every page is found from the README. No network."""

from __future__ import annotations

from pathlib import Path

import pytest

from pages import DOCS, ROOT, anchors, links, name, pages

PAGES = pages()
#: pages that another branch brings; this list goes when they are here


def leads_to(page: Path, link: str) -> Path:
    """The file a relative link means."""
    path = link.partition("#")[0]
    return (page.parent / path).resolve() if path else page


def relative(page: Path) -> list[str]:
    return [link for link in links(page) if not link.startswith(("http://", "https://", "mailto:"))]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in relative(page):
        there = leads_to(page, link)
        assert there.exists(), f"{name(page)} links to {link}, which is not there"
        assert there.is_relative_to(ROOT), f"{name(page)} links out of the repository: {link}"
        anchor = link.partition("#")[2]
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{name(page)} links to {link}: {name(there)} has no such heading"


def test_every_page_is_reachable_from_the_readme() -> None:
    seen, todo = set[Path](), [ROOT / "README.md"]
    while todo:
        if (page := todo.pop()) not in seen and page.suffix == ".md" and page.is_file():
            seen.add(page)
            todo += [leads_to(page, link) for link in relative(page)]
    assert not [name(page) for page in PAGES if page not in seen], "pages no link leads to"


def test_pictures_are_shown_somewhere() -> None:
    shown = {leads_to(page, link) for page in PAGES for link in relative(page)}
    assert not [str(path) for path in (DOCS / "images").iterdir() if path not in shown]
