"""The example in docs/api.md runs as it stands, but for the address; its table lists the routes there are."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
from pathlib import Path

from http_rigs import alone
from starlette.routing import Route

import pilotfish
from pilotfish.edge_agent.http.app import application
from pilotfish.edge_agent.http.bodies import NEUTRAL, WISHES, ChatBody, CompletionBody
from pilotfish.protocol.http_guard import Access

PAGE = (Path(pilotfish.__file__).parent / "docs/api.md").read_text()


async def test_the_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    said = io.StringIO()
    async with alone("It is 42. ") as one:
        code = example.replace("http://127.0.0.1:8787", one.url) + "client.close()\n"
        with contextlib.redirect_stdout(said):
            await asyncio.to_thread(exec, code, {})
    assert "42" in said.getvalue()


def test_the_page_names_every_parameter_that_is_served() -> None:
    served = ({*ChatBody.model_fields, *CompletionBody.model_fields} - NEUTRAL - {"parallel_tool_calls"}) | {*WISHES}
    (told,) = re.findall(r"Served: (.*?)Every other parameter", PAGE, re.S)
    assert served <= set(re.findall(r"`([a-z_]+)(?:\.[a-z_]+)?`", told))


async def test_the_table_lists_every_route() -> None:
    async with alone() as one:
        app = application(one.service, Access())
        routes = app.app.app.routes  # type: ignore[attr-defined]
    told = set(re.findall(r"`(?:GET |POST )?(/[\w/.]*)`", PAGE.split("**Parameters.**")[0]))
    assert {route.path.replace("/{id:path}", "") for route in routes if isinstance(route, Route)} <= told
