"""Metrics, health, ready and drain of an agent, and what is logged."""

from __future__ import annotations

import logging
import re
from typing import Any

import httpx
import pytest
from http_rigs import MODEL, alone, api, lonely_agent, served
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import Route, WebSocketRoute
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from pilotfish.edge_agent.http.app import application
from pilotfish.edge_agent.http.operations import agent_operations
from pilotfish.edge_agent.http.serve import serve_api, serve_operations, service_of
from pilotfish.edge_agent.http.service import Service
from pilotfish.edge_agent.task import Task
from pilotfish.protocol import metrics
from pilotfish.protocol.http_guard import Access
from pilotfish.protocol.settings import Settings

CANARY = "canary-7f3a"
API: Any = application(Service(lonely_agent()), Access())
ROUTES = {
    route.path.replace("{id:path}", MODEL): sorted({"GET", *(route.methods or ())} - {"HEAD"})
    for route in API.app.app.routes
    if isinstance(route, Route)
}
SOCKETS = [route.path for route in API.app.app.routes if isinstance(route, WebSocketRoute)]


def series() -> int:
    return sum(len(family.samples) for family in metrics.REGISTRY.collect())


async def test_the_metrics_page_is_prometheus_own_format_and_moves() -> None:
    async with alone() as one, httpx.AsyncClient(base_url=one.url) as http:
        await one.chat(max_tokens=7)
        answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert families["pilotfish_time_to_first_token_seconds"].type == "histogram"
    requests = {tuple(s.labels.values()): s.value for s in families["pilotfish_http_requests"].samples}
    assert requests["/v1/chat/completions", "200"] >= 1
    assert families["pilotfish_num_requests_running"].samples[0].value == 0


@pytest.mark.slow
async def test_ten_thousand_sessions_add_no_series() -> None:
    agent = lonely_agent()
    await agent.start()
    before = None
    for number in range(10_000):
        generation = agent.open(Task((number % 250 + 1,), "edge_only", max_tokens=1))
        async for _ in generation.run():
            pass
        agent.close(generation)
        before = before or series()
    await agent.stop()
    assert series() == before


async def test_unknown_paths_add_no_series_either() -> None:
    async with alone() as one, httpx.AsyncClient(base_url=one.url) as http:
        await http.get("/nothing")
        before = series()
        for number in range(10):
            assert (await http.get(f"/nothing/{number}")).status_code == 404
        assert (await http.get("/v1/chat/completions")).status_code == 405
        assert series() <= before + 2  # the 405, its total and when it was created


async def test_a_served_agent_is_ready_and_says_how_far_redis_is(redis_url: str) -> None:
    async with api(redis_url) as one, httpx.AsyncClient(base_url=one.url) as http:
        ready = await http.get("/ready")
    assert (ready.status_code, ready.json()["workers"]) == (200, 1)
    assert ready.json()["rtt_ms"] > 0


async def test_an_agent_without_a_worker_is_not_ready(redis_url: str) -> None:
    async with api(redis_url) as one:
        assert one.service.agent.target
        object.__setattr__(one.service.agent.target, "id", "0" * 16)
        async with httpx.AsyncClient(base_url=one.url) as http:
            answer = await http.get("/ready")
            assert (await http.get("/health")).status_code == 200, "nothing here is cured by a restart"
    assert answer.status_code == 503
    assert "pilotfish worker" in answer.json()["reason"]


async def test_drain_answers_at_once_refuses_what_comes_and_begins_the_end() -> None:
    ended: list[bool] = []
    async with alone() as plain:
        operations = agent_operations(plain.service, lambda: ended.append(True))
        async with (
            served(plain.service, operations=operations) as one,
            httpx.AsyncClient(base_url=one.url) as http,
        ):
            answer = await http.post("/drain")
            assert (answer.status_code, answer.json()) == (202, {"status": "draining", "running": 0})
            assert ended == [True]
            assert (await http.get("/ready")).status_code == 503
            assert (await http.get("/health")).status_code == 200
            refused = await http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert refused.headers["retry-after"] == "5"


async def test_the_status_tells_what_the_dashboard_shows(redis_url: str) -> None:
    async with api(redis_url, prompts=True) as one, httpx.AsyncClient(base_url=one.url) as http:
        await one.chat(max_tokens=30)
        told = (await http.get("/v1/status")).json()
    assert (told["target"], told["mode"], told["places"], told["draining"]) == (MODEL, "exact", 4, False)
    assert told["sums"]["accepted_tokens"] > 0
    assert told["cloud"]["rtt_ms"] > 0
    (target,) = told["cloud"]["targets"]
    assert [worker["beat"]["state"] for worker in target["workers"]] == ["serving"]
    assert {stream["kind"] for stream in told["cloud"]["streams"]} == {"jobs", "prompts"}


async def test_a_status_without_a_cloud() -> None:
    async with alone() as one, httpx.AsyncClient(base_url=one.url) as http:
        told = (await http.get("/v1/status")).json()
    assert (told["cloud"], told["mode"], told["target"]) == (None, "edge_only", None)


async def test_no_text_of_a_prompt_or_an_answer_is_logged(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with api(redis_url) as one:
        answer = await one.chat(messages=[{"role": "user", "content": CANARY}], max_tokens=30, user=CANARY)
        with pytest.raises(Exception, match=CANARY):
            await one.chat(messages=[{"role": "user", "content": CANARY}], extra_body={CANARY: CANARY})
    ours = [record for record in caplog.records if record.levelno > logging.DEBUG and not _clients(record)]
    lines = "\n".join(record.getMessage() + repr(vars(record)) for record in ours)
    assert re.search(r"POST /v1/chat/completions 200 [\d.]+ ms", lines)
    assert CANARY not in lines
    assert answer.choices[0].message.content not in lines


def _clients(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in ("openai", "httpx", "httpcore")


async def test_as_settings_say_with_or_without_the_api() -> None:
    agent = lonely_agent()
    settings = Settings(serve_port=0, metrics_port=0, api_key="k", mode="edge_only", max_tokens=3, serve_requests=1)
    service = service_of(settings, agent)
    assert service.turnstile.places == 1
    for serve, has_api in ((serve_api, True), (serve_operations, False)):
        async with (
            serve(settings, service, lambda: None) as url,
            httpx.AsyncClient(base_url=url, headers={"authorization": "Bearer k"}) as http,
        ):
            assert (await http.get("/ready")).status_code == 200
            answer = await http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
            assert answer.status_code == (200 if has_api else 404)
            if has_api:
                assert answer.json()["usage"]["completion_tokens"] == 3
    await agent.stop()


@pytest.mark.parametrize("serve", [serve_api, serve_operations])
async def test_whoever_has_no_key_gets_nothing_but_the_pages_own_file(serve: Any) -> None:
    service = Service(lonely_agent())
    ended: list[bool] = []
    settings = Settings(serve_port=0, metrics_port=0, api_key="k")
    async with (
        serve(settings, service, lambda: ended.append(True)) as url,
        httpx.AsyncClient(base_url=url) as http,
    ):
        for path, methods in ROUTES.items():
            for method in methods:
                for header in ({}, {"authorization": "Bearer guess"}):
                    answer = await http.request(method, path, headers=header)
                    open_to_all = path == "/" and serve is serve_api
                    assert answer.status_code == (200 if open_to_all else 401), (method, path)
        for header in ({}, {"authorization": "Bearer guess"}):
            for path in SOCKETS:
                with pytest.raises(InvalidStatus, match="403"):
                    await connect(url.replace("http", "ws") + path, additional_headers=header)
    assert not ended
    assert {type(route) for route in API.app.app.routes} == {Route, WebSocketRoute}, "a kind that nobody tried"
    assert SOCKETS
    await service.agent.stop()


async def test_the_key_of_the_metrics_alone() -> None:
    service = Service(lonely_agent())
    async with (
        served(service, Access(key="k", metrics_key="m")) as one,
        httpx.AsyncClient(base_url=one.url) as http,
    ):
        assert (await http.get("/metrics", headers={"authorization": "Bearer m"})).status_code == 200
        assert (await http.get("/metrics", headers={"authorization": "Bearer k"})).status_code == 401
        assert (await http.get("/health", headers={"authorization": "Bearer k"})).status_code == 200
        assert (await http.get("/health")).status_code == 401
    await service.agent.stop()
