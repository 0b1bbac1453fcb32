"""What went wrong, as OpenAI's clients read it: status, headers and `{"error": {message, type, param, code}}`.

The sentences are those of the error tree (`protocol/errors.py`); this page says which status each of them has.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field

from pilotfish.protocol import errors as e

log = logging.getLogger("pilotfish.http")


@dataclass(frozen=True, slots=True)
class Fault:
    """One refusal; `headers` tell a client whether and when to try again."""

    status: int
    kind: str
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        """The envelope."""
        about = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": about}).encode()


INVALID, SERVER = "invalid_request_error", "server_error"
_NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients would try every 5xx again

#: error -> (status, OpenAI's type, OpenAI's code where it has one); the first that fits
_STATUS: tuple[tuple[type[e.PilotfishError], int, str, str], ...] = (
    (e.UnknownModel, 404, INVALID, ""),
    (e.PromptTooLong, 400, INVALID, "context_length_exceeded"),
    (e.UsageError, 400, INVALID, ""),
    (e.RequestRefused, 400, INVALID, ""),
    (e.DeadlineExceeded, 504, "timeout", ""),
    (e.NoWorker, 503, SERVER, ""),
    (e.BrokerError, 503, SERVER, ""),
    (e.CloudError, 502, SERVER, ""),
    (e.PilotfishError, 500, SERVER, ""),
)
#: a worker's refusal of a job that is the request's own doing
_WIRE = {"too_long": "context_length_exceeded", "bad_request": "bad_request"}


def fault(error: Exception) -> Fault:
    """The refusal that tells an error. One that is not ours is logged, and told without its insides."""
    if isinstance(error, e.Overloaded):
        return Fault(
            429, "requests", "rate_limit_exceeded", str(error), None, {"retry-after": str(error.retry_after_s)}
        )
    if isinstance(error, e.Draining):
        return Fault(503, SERVER, error.code, str(error), None, {"retry-after": "5"})
    if isinstance(error, e.JobRefused) and error.wire_code in _WIRE:
        return Fault(400, INVALID, _WIRE[error.wire_code], str(error))
    for kind, status, word, code in _STATUS:
        if isinstance(error, kind):
            headers = _NO_RETRY if status in (500, 502, 504) else {"retry-after": "1"} if status == 503 else {}
            return Fault(status, word, code or error.code, str(error), getattr(error, "param", None), headers)
    log.error("a request raised", exc_info=error)
    return Fault(500, SERVER, "internal", f"{type(error).__name__}: the agent's log has the rest", None, _NO_RETRY)
