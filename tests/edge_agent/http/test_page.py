"""The page in a real browser: tokens by origin, corrections, text as text, dark and light, a phone, a key, keys."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from chromium import PROGRAM, Browser, browser
from http_rigs import Served, alone, api, served
from rigs import draws

from helpers import wait_until
from pilotfish.edge_agent.http.page import FILE
from pilotfish.protocol import metrics
from pilotfish.protocol.http_guard import Access

PANELS = {
    "rate": r"[\d,]+", "rtt": r"\d+\.\d\d ms", "running": r"0 of 4", "depth": r"0 waiting", "oldest": r"empty",
    "cache": r"\d+\.\d %", "budget": r".+(disagree about|audited tokens|none of them audited)",
}  # fmt: skip


CLIPPED = """[...document.querySelectorAll('.panel, #workers th, #workers td + td')].filter((box) => {
    const words = document.createRange();
    words.selectNodeContents(box);
    return box.scrollWidth > box.clientWidth + 1 || words.getBoundingClientRect().right > innerWidth
        || (box.matches('th, td') && words.getClientRects().length > 1);
}).map((box) => box.textContent)"""  # wider than there is room for, or a word broken in two


def in_browser(test: Any) -> Any:
    """Takes seconds, and a Chromium."""
    return pytest.mark.slow(pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium on PATH")(test))


@asynccontextmanager
async def page(one: Served, folder: Path) -> AsyncIterator[Browser]:
    async with browser(folder) as seen:
        await seen.look(1280, 800, "dark")
        await seen.open(one.url + "/")
        yield seen
        assert not seen.complaints, seen.complaints


async def ask(seen: Browser, text: str, tokens: int) -> None:
    await seen.until("document.getElementById('model').options.length")
    await seen.js(f"document.getElementById('max').value = {tokens}; document.getElementById('text').focus()")
    await seen.type(text)
    await seen.press("Enter")


async def answered(seen: Browser) -> None:
    await seen.until(
        "document.getElementById('send').textContent === 'Send' && document.querySelector('.cost')?.textContent"
    )


@in_browser
async def test_a_question_asked_before_the_page_knows_the_agent_is_answered(redis_url: str, tmp_path: Path) -> None:
    async with api(redis_url, prompts=True) as one, page(one, tmp_path) as seen:
        await seen.until("document.getElementById('model').options.length")
        await seen.js("for (const name of ['model', 'mode']) document.getElementById(name).replaceChildren()")
        await seen.js("document.getElementById('text').value = 'hello'; document.getElementById('send').click()")
        assert not await seen.js("document.querySelectorAll('.turn').length")
        await seen.js("offered = ''")  # as it is before the first answer
        await answered(seen)
        assert not await seen.js("document.querySelectorAll('.cost.failed').length")


@in_browser
async def test_every_token_shows_its_origin_and_corrections_are_seen(redis_url: str, tmp_path: Path) -> None:
    async with api(redis_url, prompts=True) as one, page(one, tmp_path) as seen:
        await seen.js("document.getElementById('keep').checked = true")
        await ask(seen, "hello", 60)
        await answered(seen)
        ids = await seen.js("[...document.querySelectorAll('.t')].map(made => made.about.id)")
        assert ids == draws(tuple(b"hello"), 60)
        counts = await seen.js(
            "Object.fromEntries(['accepted','corrected','continued','local'].map("
            "name => [name, document.querySelectorAll('.t.' + name).length]))"
        )
        assert counts["accepted"] > counts["corrected"] > 0 == counts["local"]
        assert await seen.js("document.querySelectorAll('.was').length") == counts["corrected"]
        assert await seen.js("document.querySelectorAll('.draft').length") == 0
        colours = await seen.js(
            "['accepted','corrected'].map(n => getComputedStyle(document.querySelector('.t.'+n)).color)"
        )
        assert len(set(colours)) == 2
        await seen.js("document.querySelector('.answer').focus()")
        for _ in range(3):
            await seen.press("ArrowRight")
        told = await seen.js("document.getElementById('inspector').textContent")
        assert f"token 2, id {ids[2]}" in told
        assert "confidence 0.700" in told
        await seen.until("document.getElementById('acceptance').textContent.includes('%')")
        await seen.until("document.getElementById('workers').textContent.includes('serving')")
        await seen.until("document.getElementById('cache').textContent.includes('%')")
        shown = await seen.js(
            "Object.fromEntries(['rate', 'rtt', 'running', 'depth', 'oldest', 'cache', 'budget'].map("
            "id => [id, document.getElementById(id).textContent]))"
        )
        for panel, pattern in PANELS.items():
            assert re.fullmatch(pattern, shown[panel]), (panel, shown[panel])
        for width in (1280, 390, 320):
            await seen.look(width, 844, "light")
            assert await seen.js(CLIPPED) == []


@in_browser
async def test_disagreement_stands_beside_its_budget(tmp_path: Path) -> None:
    async with alone("words ") as one, page(one, tmp_path) as seen:
        await one.chat(max_tokens=30)
        metrics.AUDITED.inc(100)
        metrics.AUDIT_DISAGREED.inc(1)
        told = await seen.until("document.getElementById('budget').textContent.match(/^.* of 2.0 %, from .*/)?.[0]")
        assert re.fullmatch(r"\d+\.\d % of 2\.0 %, from [\d,]+ audited tokens", told)
        assert await seen.js("!document.getElementById('budget-bar').hidden")


@in_browser
async def test_what_a_model_says_is_text_and_nothing_else(tmp_path: Path) -> None:
    evil = "<img src=x onerror='document.title=1'><script>document.title=2</script>&lt; "
    async with alone(evil) as one, page(one, tmp_path) as seen:
        await ask(seen, "<b>hello</b>", 3 * len(evil))
        await answered(seen)
        assert evil in await seen.js("document.querySelector('.answer').textContent")
        assert await seen.js("document.querySelector('.user').textContent") == "<b>hello</b>"
        assert await seen.js("document.querySelectorAll('#talk img, #talk script, #talk b').length") == 0
        assert await seen.js("document.title") == "pilotfish"
        assert await seen.js("document.querySelectorAll('.t.local').length") == 3 * len(evil)


@in_browser
async def test_dark_light_and_a_phone(tmp_path: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    async with alone("words ") as one, page(one, tmp_path) as seen:
        dark = await seen.js(ground)
        await seen.look(390, 844, "light")
        assert await seen.js(ground) != dark
        await ask(seen, "a question", 40)
        await answered(seen)
        assert await seen.js("document.documentElement.scrollWidth <= innerWidth"), "a phone must not scroll sideways"
        await seen.js("document.getElementById('theme').click()")
        assert await seen.js(ground) == dark
        await seen.open(one.url + "/")
        assert await seen.js(ground) == dark, "the choice is remembered"
        for scheme in ("dark", "light"):
            await seen.look(1280, 800, scheme)
            assert await seen.js("document.documentElement.scrollWidth <= innerWidth")


@in_browser
async def test_the_key_is_asked_for_and_escape_stops_an_answer(tmp_path: Path) -> None:
    async with (
        alone("words ", token_ms=3) as plain,
        served(plain.service, Access(key="gehéim", open_paths=frozenset("/"))) as one,
        browser(tmp_path) as seen,
    ):
        await seen.open(one.url + "/")
        await seen.until("!document.getElementById('ask-key').hidden")
        await seen.js("document.getElementById('key').focus()")
        await seen.type("gehéim")
        await seen.press("Enter")
        await ask(seen, "hello", 3000)
        await seen.until("document.querySelectorAll('.t').length > 5")
        await seen.press("Escape")
        await answered(seen)
        assert await seen.js("document.querySelector('.cost').textContent") == "stopped"
        await wait_until(lambda: not one.service.agent.generations, "the agent to stop too")


async def test_the_policy_lets_in_nothing_but_the_pages_own_parts() -> None:
    async with alone() as one, httpx.AsyncClient() as http:
        answer = await http.get(one.url + "/")
        policy = answer.headers["content-security-policy"]
    assert answer.text == FILE.read_text()
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "*" not in policy
    assert policy.count("sha256-") == 2


def test_the_page_has_no_outside_resource_and_reads_nothing_as_markup() -> None:
    text = FILE.read_text()
    assert not [
        word
        for word in ("http://", "https://", "innerHTML", "insertAdjacentHTML", "eval(", "document.write")
        if word in text
    ]
    assert "src=" not in text
