from __future__ import annotations

import json
import logging
import sys

from pilotfish.protocol.logs import JsonLines


def line(message: str, *args: object, **more: object) -> dict[str, object]:
    record = logging.LogRecord("pilotfish.x", logging.WARNING, __file__, 1, message, args, None)
    vars(record).update(more)
    told: dict[str, object] = json.loads(JsonLines().format(record))
    return told


def test_a_line_is_one_json_object_with_its_extras() -> None:
    told = line("served %s\nin a while", "it", route="/v1/models", status=200)
    assert (told["level"], told["logger"], told["message"]) == ("warning", "pilotfish.x", "served it\nin a while")
    assert (told["route"], told["status"]) == ("/v1/models", 200)
    assert str(told["time"]).endswith("+00:00")


def test_a_traceback_is_part_of_its_line() -> None:
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        told = line("broken", exc_info=sys.exc_info())
    assert "ZeroDivisionError" in str(told["traceback"])


def test_what_json_cannot_say_is_said_as_text() -> None:
    assert line("odd", thing={1, 2}.__class__)["thing"] == "<class 'set'>"
