"""One trace from the edge through queue and engine and back: real agent, real Redis, real worker, spans in memory."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from http_rigs import HELLO, MODEL, api
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import ValidationError
from rigs import job

from helpers import wait_until
from pilotfish.protocol import tracing
from pilotfish.protocol.codec import decode, encode
from pilotfish.protocol.errors import SettingsError
from pilotfish.protocol.messages import VerifyJob

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def parent_of(span: ReadableSpan, spans: list[Any]) -> str:
    assert span.parent
    found = [other for other in spans if other.context.span_id == span.parent.span_id]
    return found[0].name if found else "caller"


async def test_a_request_is_one_trace_from_the_caller_to_the_engine_and_back(redis_url: str) -> None:
    kept = InMemorySpanExporter()
    async with api(redis_url) as one, httpx.AsyncClient(base_url=one.url) as http:
        with tracing.recording("test", SimpleSpanProcessor(kept)):
            body = {"model": MODEL, "messages": HELLO, "max_tokens": 20}
            answer = await http.post("/v1/chat/completions", json=body, headers={"traceparent": CALLER})
            rounds = answer.json()["choices"][0]["pilotfish"]["rounds"]
            await wait_until(
                lambda: names(kept).count("verify") == names(kept).count("queue") > 0, "the workers' spans"
            )
    spans = list(kept.get_finished_spans())
    assert {span.context.trace_id for span in spans} == {int(CALLER.split("-")[1], 16)}
    assert {(span.name, parent_of(span, spans)) for span in spans} == {
        ("generation", "caller"), ("draft", "generation"), ("round", "generation"), ("queue", "round"),
        ("verify", "round"), ("engine", "verify"),
    }  # fmt: skip
    assert names(kept).count("round") == rounds >= names(kept).count("engine")
    for span in spans:
        assert "hello" not in str(span.attributes)
        assert (span.start_time or 0) <= (span.end_time or 0)


def names(kept: InMemorySpanExporter) -> list[str]:
    return [span.name for span in kept.get_finished_spans()]


def test_off_it_is_nothing() -> None:
    trace = tracing.Trace(mode="exact")
    trace.drafted(4, 1.0)
    assert trace.published(0) == ""
    trace.answered(0)
    trace.end()
    assert tracing.Span("x").context == ""


def test_a_round_that_is_sent_again_or_abandoned_still_ends() -> None:
    kept = InMemorySpanExporter()
    with tracing.recording("test", SimpleSpanProcessor(kept)):
        trace = tracing.Trace()
        trace.published(0)
        trace.published(0)
        trace.published(1)
        trace.end()
    outcomes = [(s.attributes or {}).get("outcome") for s in kept.get_finished_spans() if s.name == "round"]
    assert outcomes == ["sent again", "abandoned", "abandoned"]


def test_a_job_carries_a_trace_and_nothing_else_there() -> None:
    told = decode(encode(job(trace=CALLER)), VerifyJob)
    assert told.trace == CALLER
    assert b"trace" not in encode(job())
    with pytest.raises(ValidationError):
        job(trace="x")


def test_a_header_that_is_none_begins_a_trace_of_its_own() -> None:
    kept = InMemorySpanExporter()
    with tracing.recording("test", SimpleSpanProcessor(kept)):
        assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[13]", tracing.Span("x", "nonsense").context)


def test_a_collector_is_sent_what_was_recorded() -> None:
    """Whatever listens at the endpoint: here, something that keeps the paths and bodies it is sent."""
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silent."""

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        answering = threading.Thread(target=server.serve_forever)
        answering.start()
        try:
            with tracing.exporting("pilotfish-test", f"http://127.0.0.1:{server.server_port}/"):
                tracing.Span("round", CALLER).end(outcome="verdict")
        finally:
            server.shutdown()
            answering.join()
    ((path, body),) = got
    assert path == "/v1/traces"
    assert all(word in body for word in (b"pilotfish-test", b"round", bytes.fromhex(CALLER.split("-")[1])))


def test_without_the_sdk_the_endpoint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"pilotfish\[trace\]"), tracing.exporting("x", "http://127.0.0.1:4318"):
        pass
