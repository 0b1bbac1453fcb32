"""The READMEs: commands that exist, the Chinese one in step with the English one, the picture as it is drawn."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import typer

from pages import DOCS, ROOT, commands, fences, name, pages, prose
from pilotfish.cli.main import app
from pilotfish.protocol.messages import Mode

ENGLISH, CHINESE = ROOT / "README.md", DOCS / "README.zh-CN.md"
ROOT_COMMAND = typer.main.get_command(app)
PAGES = [page for page in pages() if name(page) != "docs/cli.md"]


def ours(page: Path) -> list[list[str]]:
    """A page's `pilotfish …` command lines, as words, without what a shell does with their output."""
    found = []
    for line in commands(page):
        for piece in re.findall(r"(?:^|\| |[A-Z_]+=\S+ )pilotfish (.*)", line):
            words = shlex.split(re.sub(r"\$\(.*?\)|…|\.\.\.", "X", piece), comments=True)
            end = next((index for index, word in enumerate(words) if word in ("<", ">", "|", "-")), len(words))
            found.append(words[:end])
    return found


def options(command: Any) -> set[str]:
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in ours(page):
        command: Any = ROOT_COMMAND
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in options(command), f"{name(page)}: no {word} of `pilotfish {words}`"
            elif hasattr(command, "commands"):
                assert word in command.commands, f"{name(page)}: there is no `pilotfish {' '.join(words)}`"
                command = command.commands[word]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_tenants_user_says_whose_it_is(page: Path) -> None:
    """Its user may touch no keys but its tenant's, and without --tenant a command asks for `default`."""
    for line in commands(page):
        for tenant in re.findall(r"://([\w-]+)\+(?:agent|shell).*pilotfish", line):
            assert f"--tenant {tenant}" in line, f"{name(page)}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_named_in_passing_exist(page: Path) -> None:
    known = {flag for command in every(ROOT_COMMAND) for flag in options(command)}
    named = {flag for span in re.findall(r"`([^`\n]+)`", prose(page)) for flag in re.findall(r"(?<!\S)--[a-z-]+", span)}
    ours = {"--resume", "--work", "--to", "--rtt-ms"}  # of python -m
    theirs = {"--scale", "--build", "--profile", "--require-hashes"}  # compose, pip
    assert not named - known - ours - theirs, f"{name(page)} names options that do not exist"


def every(command: Any) -> list[Any]:
    return [command, *(below for child in getattr(command, "commands", {}).values() for below in every(child))]


def test_make_has_the_targets_of_the_readme() -> None:
    makefile = (ROOT / "Makefile").read_text()
    wanted = re.findall(r"^make (\S+)", "\n".join(commands(ENGLISH)), re.M)
    assert wanted == ["demo", "test"], "the two commands come first"
    assert all(re.search(rf"(?m)^{target}:", makefile) for target in wanted)


def without_comments(page: Path) -> list[str]:
    return [re.sub(r"\s+#.*", "", line) for block in fences(page, "sh") for line in block.text.splitlines()]


def test_both_readmes_tell_the_same_commands() -> None:
    assert without_comments(CHINESE) == without_comments(ENGLISH)


def test_both_tell_the_same_modes() -> None:
    told = [re.findall(r"(?m)^\| `(\w+)`", page.read_text(encoding="utf-8")) for page in (ENGLISH, CHINESE)]
    assert [found[:4] for found in told] == [list(get_args(Mode))] * 2


def test_every_figure_of_the_chinese_one_stands_in_the_english_one() -> None:
    told = set(re.findall(r"\d[\d,.]*\d|\d", prose(CHINESE)))
    assert told <= set(re.findall(r"\d[\d,.]*\d|\d", ENGLISH.read_text(encoding="utf-8")))


def test_the_tree_of_the_readme_is_the_tree() -> None:
    (tree,) = fences(ENGLISH, "")
    rooms = re.findall(r"(?:^|\s{2,})(\w+)/ ", tree.text, re.M)
    assert {"protocol", "cache", "edge_agent", "cloud_worker", "cli", "bench", "demo", "docs", "tests"} <= set(rooms)
    assert all((ROOT / room).is_dir() for room in {*rooms} - {"http", "fundamentals"})


def drawn() -> ModuleType:
    spec = importlib.util.spec_from_file_location("picture", ROOT / "tools" / "picture.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_as_its_script_draws_it() -> None:
    tool = drawn()
    for which, palette in (("light", tool.LIGHT), ("dark", tool.DARK)):
        assert (DOCS / f"images/round-{which}.svg").read_text() == tool.picture(palette), (
            "stale: python tools/picture.py"
        )
