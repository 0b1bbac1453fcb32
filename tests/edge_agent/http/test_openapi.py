"""The description against the server it describes: schemathesis makes requests of every kind from it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from http_rigs import MODEL, alone, lonely_agent, served
from hypothesis import HealthCheck, Phase, given, settings
from starlette.routing import Route

from pilotfish.edge_agent.http.app import application
from pilotfish.edge_agent.http.service import Service
from pilotfish.protocol.http_guard import Access

pytestmark = pytest.mark.slow  # importing schemathesis alone takes seconds, so that is done at use
OPERATIONS = [("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models/{id}")]
PLAIN = ["/v1/models", "/v1/status", "/metrics", "/health", "/ready"]
ENDS_IT = ("POST", "/drain")


def checks() -> list[Any]:
    """What every answer must pass."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as of_openapi

    names = (
        "content_type_conformance negative_data_rejection response_headers_conformance "
        "response_schema_conformance status_code_conformance"
    )
    return [not_a_server_error, *(getattr(of_openapi, name) for name in names.split())]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """An API in a thread of its own: schemathesis is synchronous."""
    loop, up, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    where: list[str] = []

    async def serve() -> None:
        async with alone() as one:
            where.append(one.url)
            up.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert up.wait(10)
    yield where[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def described(url: str) -> Any:
    import schemathesis

    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_server_is_as_it_is_described(described: Any, method: str, path: str, mode: str) -> None:
    from schemathesis import GenerationMode

    @settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate], database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(described[path][method].as_strategy(generation_mode=GenerationMode(mode)))
    def holds(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
            case.body["max_tokens"] = min(case.body["max_tokens"], 20)
        case.call_and_validate(checks=checks(), timeout=20)

    holds()


@pytest.mark.parametrize("path", PLAIN)
def test_what_takes_nothing_answers_as_described(described: Any, path: str) -> None:
    described[path]["GET"].Case().call_and_validate(checks=checks(), timeout=20)


def test_whoever_has_no_key_is_refused_as_described() -> None:
    """In a loop of this test's own: the server of the others asks for none."""
    import schemathesis

    async def asked() -> None:
        async with alone() as plain, served(plain.service, Access(key="k")) as one:
            described = await asyncio.to_thread(
                schemathesis.openapi.from_url, f"{one.url}/openapi.json", headers={"authorization": "Bearer k"}
            )
            for method, path in [*OPERATIONS, *(("GET", path) for path in PLAIN), ENDS_IT]:
                case = described[path][method].Case(
                    path_parameters={"id": MODEL}, media_type="application/json", body={}
                )
                answer = await asyncio.to_thread(case.call, timeout=20)
                assert answer.status_code == 401, path
                case.validate_response(answer, checks=[check for check in checks() if "negative" not in check.__name__])

    asyncio.run(asked())


def test_all_that_is_served_is_described_and_tried(described: Any) -> None:
    tried = {*OPERATIONS, *(("GET", path) for path in PLAIN), ENDS_IT}
    raw = described.raw_schema["paths"]
    assert {(method.upper(), path) for path, operations in raw.items() for method in operations} == tried
    app = application(Service(lonely_agent()), Access())
    paths = {route.path.replace(":path", "") for route in app.app.app.routes if isinstance(route, Route)}  # type: ignore[attr-defined]
    assert paths - set(raw) == {"/", "/openapi.json"}


def test_the_description_names_the_models_served(described: Any) -> None:
    body = described.raw_schema["components"]["schemas"]["ChatBody"]
    assert body["properties"]["model"]["enum"] == [MODEL]
