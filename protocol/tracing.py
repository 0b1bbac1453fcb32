"""Optional OpenTelemetry: one trace from the edge through the queue and the engine and back. The one owner of its SDK.

    generation            edge      a request's whole life, child of the caller's own `traceparent` if it sent one
    ├─ draft              edge      one batch of the draft model
    └─ round              edge      from the job's publication to its verdict; its context travels in `VerifyJob.trace`
       ├─ queue           worker    the job's age when its turn came
       └─ verify          worker    from its turn to its last verdict
          └─ engine       worker    what of that the engine took

Off until `exporting` is entered; off, everything here costs an `if`. Attributes are counts, names and times, no text.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pilotfish.protocol.errors import SettingsError

#: W3C `traceparent` of whoever asked; what is begun in this context is its child
CALLER: ContextVar[str] = ContextVar("caller", default="")
NANOS = 1_000_000

_tracer: Any = None


@contextmanager
def exporting(service: str, endpoint: str | None) -> Iterator[None]:
    """Send spans to a collector for the block, if there is an endpoint. Raises SettingsError without the SDK."""
    if not endpoint:
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingsError(
            f"--otlp-endpoint needs {error.name}: pip install 'pilotfish[trace]', or leave it out"
        ) from None
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    with recording(service, BatchSpanProcessor(exporter)):
        yield


@contextmanager
def recording(service: str, processor: Any) -> Iterator[None]:
    """Hand every finished span to a span processor of the SDK, for the block."""
    global _tracer
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(processor)
    _tracer = provider.get_tracer("pilotfish")
    try:
        yield
    finally:
        _tracer = None
        provider.shutdown()


class Span:
    """One span, or nothing at all while tracing is off. `context` is what a child, here or elsewhere, is given."""

    __slots__ = ("_span", "context")

    def __init__(self, name: str, parent: str = "", *, start_ns: int | None = None, **about: Any) -> None:
        self._span: Any = None
        self.context = ""
        if _tracer is not None:
            self._span = _tracer.start_span(name, _context(parent), start_time=start_ns, attributes=about)
            told = self._span.get_span_context()
            self.context = f"00-{told.trace_id:032x}-{told.span_id:016x}-{int(told.trace_flags):02x}"

    def end(self, **about: Any) -> None:
        """It is over; once is enough."""
        if self._span is not None:
            self._span.set_attributes(about)
            self._span.end()
            self._span = None


def past(name: str, parent: str, ms: float, **about: Any) -> None:
    """A span that ends now and lasted `ms`."""
    if _tracer is not None:
        Span(name, parent, start_ns=time.time_ns() - int(ms * NANOS), **about).end()


def _context(parent: str) -> Any:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": parent}, Context()) if parent else Context()


class Trace:
    """A generation's spans: rounds begin and end, in any order, under the one it began with."""

    def __init__(self, **about: Any) -> None:
        self._whole = Span("generation", CALLER.get(), **about)
        self._rounds: dict[int, Span] = {}

    def drafted(self, tokens: int, ms: float) -> None:
        """One batch of the draft model has just ended."""
        if _tracer is not None:
            past("draft", self._whole.context, ms, tokens=tokens)

    def published(self, number: int, **about: Any) -> str:
        """A round's job leaves now; gives what it carries. A round sent again ends the span of its first try."""
        if _tracer is None:
            return ""
        self.answered(number, outcome="sent again")
        self._rounds[number] = Span("round", self._whole.context, round=number, **about)
        return self._rounds[number].context

    def answered(self, number: int, **about: Any) -> None:
        """A round's last word came."""
        if span := self._rounds.pop(number, None):
            span.end(**about)

    def end(self, **about: Any) -> None:
        """The generation is over, and with it whatever is still out."""
        for number in list(self._rounds):
            self.answered(number, outcome="abandoned")
        self._whole.end(**about)
