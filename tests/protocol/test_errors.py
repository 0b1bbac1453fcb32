"""The page of errors: its tree is the classes' own, and every error says its code and its exit."""

from __future__ import annotations

import inspect
import re

import pytest

from pilotfish.protocol import errors
from pilotfish.protocol.errors import JobRefused, PilotfishError

CLASSES = {name: kind for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, PilotfishError)}
LINE = re.compile(r"^    ([ │├└─]*)([A-Z]\w+) ", re.MULTILINE)


def drawn_parents() -> dict[str, str]:
    """Class -> parent, as the docstring draws it: four characters of branch are one level."""
    path: list[str] = []
    parents: dict[str, str] = {}
    for branch, name in LINE.findall(errors.__doc__ or ""):
        path[len(branch) // 4 :] = [name]
        parents[name] = path[-2] if len(path) > 1 else "Exception"
    return parents


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    assert drawn_parents() == {name: kind.__bases__[0].__name__ for name, kind in CLASSES.items()}


def test_every_code_names_one_error() -> None:
    codes = [kind.code for kind in CLASSES.values()]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z_]{1,64}", code) for code in codes), "a code fits the field of `Failed`"


@pytest.mark.parametrize("kind", CLASSES.values())
def test_every_error_leaves_the_shell_with_a_failure_and_its_sentence(kind: type[PilotfishError]) -> None:
    error = kind("code", "a sentence") if kind is JobRefused else kind("a sentence")
    assert str(error) == "a sentence"
    assert 0 < error.exit_code < 256


def test_a_refused_job_keeps_the_workers_code() -> None:
    assert JobRefused("too_long", "the context is full").wire_code == "too_long"
