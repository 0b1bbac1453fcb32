"""The page of keys: its table and its functions say the same, and no two of anything can share a key."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pilotfish.protocol import keys

FUNCTIONS: dict[str, Callable[..., str]] = {
    name: function
    for name, function in inspect.getmembers(keys, inspect.isfunction)
    if function.__module__ == keys.__name__
}
ROW = re.compile(r"^ {4}(pf:\S+) +(set|hash|zset|string|stream) +(for ever|[A-Z_]+_MS) +\S", re.MULTILINE)
TABLE = {key: (kind, life) for key, kind, life in ROW.findall(keys.__doc__ or "")}

NAME = st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True)
HEX = st.text("0123456789abcdef", min_size=16, max_size=16)
REQUEST = st.text("0123456789abcdef", min_size=32, max_size=32)
ARGUMENTS = {"target": HEX, "request": REQUEST, "tenant": NAME, "agent": NAME, "worker": NAME}
ARGUMENTS |= {"epoch": st.integers(0, 2**53).map(str), "bucket": st.integers(0, 4096).map(str)}


def shape(function: Callable[..., str]) -> str:
    """A function's key as the table writes it."""
    return function(**{name: f"<{name}>" for name in inspect.signature(function).parameters})


@st.composite
def spelled(draw: st.DrawFn) -> tuple[tuple[str, ...], str]:
    """(who asked for what, the key): a function with arguments that messages and settings allow."""
    name = draw(st.sampled_from(sorted(FUNCTIONS)))
    given_names = {each: draw(ARGUMENTS[each]) for each in inspect.signature(FUNCTIONS[name]).parameters}
    return (name, *given_names.values()), FUNCTIONS[name](**given_names)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_its_row_in_the_table(name: str) -> None:
    assert shape(FUNCTIONS[name]) in TABLE


def test_every_row_of_the_table_has_its_function_or_constant() -> None:
    spelled_out = {shape(function) for function in FUNCTIONS.values()} | {
        keys.TENANTS, keys.QUOTAS, keys.TARGETS, keys.SALT
    }  # fmt: skip
    any_worker = keys.jobs("<target>", "<tenant>")
    assert set(TABLE) == spelled_out | {any_worker}


def test_every_life_time_in_the_table_is_a_constant_and_only_three_keys_live_for_ever() -> None:
    for kind, life in TABLE.values():
        assert kind
        assert life == "for ever" or getattr(keys, life) > 0
    assert {key for key, (_, life) in TABLE.items() if life == "for ever"} == {keys.TENANTS, keys.QUOTAS, keys.TARGETS}


@given(spelled(), spelled())
def test_two_keys_are_equal_only_if_everything_they_were_made_of_is(
    one: tuple[tuple[str, ...], str], other: tuple[tuple[str, ...], str]
) -> None:
    assume(one[0] != other[0])
    assert one[1] != other[1]


@given(spelled())
def test_a_name_never_adds_a_part_to_a_key_nor_makes_it_one_of_the_shared_two(one: tuple[tuple[str, ...], str]) -> None:
    (name, *_), key = one
    assert key.startswith(f"{keys.PREFIX}:")
    assert key.count(":") == shape(FUNCTIONS[name]).count(":")
    assert key not in (keys.TENANTS, keys.TARGETS)


@given(NAME, NAME, HEX)
def test_an_acl_pattern_of_one_tenant_matches_no_key_of_another(mine: str, other: str, target: str) -> None:
    """A tenant is a Redis ACL user who may touch these patterns, and `*` may match any text at all."""
    assume(mine != other)
    patterns = [f"pf:*:jobs:{mine}:*", f"pf:rep:{mine}:*", f"pf:a:{mine}:*", f"pf:out:{mine}:*", f"pf:prompts:{mine}"]
    theirs = [
        keys.jobs(target, other, "w"),
        keys.replies(other, "a"),
        keys.agent_beat(other, "a"),
        keys.output(other, "0" * 32),
        keys.prompts(other),
        keys.agents(other),
        keys.forwarded(target, other),
        keys.use(target, other),
        keys.index_worker(target, other),
        keys.index_bucket(target, 1, 2, other),
    ]
    for pattern in patterns:
        matcher = re.compile(re.escape(pattern).replace(r"\*", ".*"))
        assert not any(matcher.fullmatch(key) for key in theirs), pattern


def test_the_stream_of_any_worker_is_reserved() -> None:
    """A worker that called itself `any` would read it as its own: `any` is no worker's name."""
    assert keys.jobs("t", "one", keys.ANY) == keys.jobs("t", "one")
