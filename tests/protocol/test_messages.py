"""The page of messages as a page: every message documented, bounded, frozen, and in exactly one direction."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from pydantic import ValidationError

from pilotfish.protocol import messages as m

MESSAGES = {
    name: kind
    for name, kind in inspect.getmembers(m, inspect.isclass)
    if issubclass(kind, m.Message) and kind is not m.Message
}
INSIDE_OTHERS = {m.Sampling, m.Summary}
DIRECTIONS: dict[str, Any] = {
    "Edge to worker": m.ToWorker, "Worker to edge": m.ToEdge, "Shell to agent": m.ToAgent, "Agent to shell": m.ToShell,
}  # fmt: skip
SESSION = "0" * 32


def members(union: Any) -> tuple[type[m.Message], ...]:
    return tuple(getattr(union, "__args__", [union]))


def test_every_message_goes_somewhere_and_has_a_type_of_its_own() -> None:
    sent = {kind for union in DIRECTIONS.values() for kind in members(union)}
    assert sent | INSIDE_OTHERS == set(MESSAGES.values())
    types = [kind.model_fields["type"].default for kind in sent]
    assert len(set(types)) == len(types)


def test_the_pages_head_lists_every_message() -> None:
    head = m.__doc__ or ""
    assert all(kind.__name__ in head for union in DIRECTIONS.values() for kind in members(union))


@pytest.mark.parametrize("kind", MESSAGES.values(), ids=MESSAGES)
def test_a_message_is_frozen_and_refuses_unknown_fields(kind: type[m.Message]) -> None:
    assert kind.model_config["frozen"]
    assert kind.model_config["extra"] == "forbid"
    assert kind.__doc__


@pytest.mark.parametrize("kind", MESSAGES.values(), ids=MESSAGES)
def test_every_number_text_and_array_has_a_bound(kind: type[m.Message]) -> None:
    for name, schema in kind.model_json_schema()["properties"].items():
        for each in schema.get("anyOf", [schema]):
            assert bounded(each), f"{kind.__name__}.{name} has no upper bound: {each}"


def bounded(schema: dict[str, Any]) -> bool:
    """True if a value of this schema cannot be arbitrarily large."""
    match schema.get("type"):
        case "integer" | "number":
            return "maximum" in schema
        case "string":
            return bool({"maxLength", "pattern", "enum", "const"} & set(schema))
        case "array":
            return "maxItems" in schema and bounded(schema["items"])
        case _:
            return True  # booleans, nothing, and messages within messages


def test_an_epoch_outlives_every_deadline() -> None:
    """An agent that waits a day asks afresh ten times a second, and each time is an epoch."""
    job = {"agent": "a", "boot": "b", "session": SESSION, "round": 0, "base": 1, "digest": b"d" * 16, "offset": 0}
    assert m.VerifyJob(**job, ids=(1,), epoch=24 * 3600 * 10).epoch == 864_000


def test_a_refusal_names_its_job_and_its_sentence_fits() -> None:
    about = {"boot": "b", "session": SESSION, "epoch": 3, "round": 4}
    job = m.VerifyJob(agent="a", base=1, digest=b"d" * 16, offset=0, ids=(1,), **about)
    refusal = m.Refusal.of(job, "stale", "x" * 501, worker="w1", credit=2)
    assert refusal.model_dump(exclude={"type"}) == {
        **about, "code": "stale", "sentence": "x" * 500, "worker": "w1", "credit": 2,
    }  # fmt: skip
    unread = m.Refusal.of(None, "invalid_message", "no", worker="w1", credit=0)
    assert (unread.boot, unread.session, unread.epoch, unread.round) == ("", "", 0, 0)


def test_a_message_cannot_be_changed() -> None:
    note = m.Cancel(agent="a", boot="b", session=SESSION)
    with pytest.raises(ValidationError, match="frozen"):
        note.agent = "c"  # type: ignore[misc]


@pytest.mark.parametrize("name", ["", "a:b", "a b", "ä", "a\n", "x" * 65, "*", "a/b"])
def test_a_name_becomes_part_of_a_key_and_holds_nothing_special(name: str) -> None:
    with pytest.raises(ValidationError):
        m.Cancel(agent=name, boot="b", session=SESSION)
