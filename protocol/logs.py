"""How log lines look: a line for people, or one JSON object each, with whatever `extra` a call gave.

What is logged above DEBUG holds no text of a prompt or an answer, and no key: ids, counts, times and sentences only.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

#: what every record has by itself; the rest came as `extra`
_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonLines(logging.Formatter):
    """One JSON object per record: time (UTC), level, logger, message, extras, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _USUAL}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def use_json() -> None:
    """From here on every handler of the root logger writes JSON lines."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonLines())


def recorded(line: str, level: str) -> bool:
    """Whether the log is JSON; then the line has become an object of it, whatever the log's level."""
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler.formatter, JsonLines)]
    for handler in handlers:
        number = logging.getLevelNamesMapping()[level]
        handler.handle(logging.LogRecord("pilotfish", number, "", 0, line, None, None))
    return bool(handlers)
