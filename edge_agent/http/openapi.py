"""The API's own description, OpenAPI 3.1, made of the models that read and write it; the ids served stand in it."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from pilotfish.edge_agent.http import answers, bodies
from pilotfish.edge_agent.http.service import Service

ASKED: tuple[type[BaseModel], ...] = (bodies.ChatBody, bodies.CompletionBody)
TOLD: tuple[type[BaseModel], ...] = (
    answers.ChatCompletion, answers.ChatChunk, answers.Completion, answers.Models, answers.Model, answers.Failure,
)  # fmt: skip
REFUSALS = {
    "400": "The request cannot be served; `param` names what of it.",
    "401": "The key is missing or wrong.",
    "403": "Host or Origin are not this server's.",
    "404": "No such model.",
    "429": "Full: come back after Retry-After seconds.",
    "500": "A fault of ours.",
    "502": "A worker refused the job.",
    "503": "Redis or the cloud are away, or this agent is ending.",
    "504": "The deadline passed.",
}


async def show(request: Request) -> Response:
    """GET /openapi.json."""
    return Response(json.dumps(document(request.app.state.service)), media_type="application/json")


def document(service: Service) -> dict[str, Any]:
    """The whole description."""
    from importlib.metadata import version

    return {
        "openapi": "3.1.0",
        "info": {"title": "pilotfish", "version": version("pilotfish"), "description": __doc__},
        "paths": {
            "/v1/chat/completions": {"post": _completion("ChatBody", "ChatCompletion", "Answer a conversation.")},
            "/v1/completions": {"post": _completion("CompletionBody", "Completion", "Continue a text.")},
            "/v1/models": {"get": _get("Models", "What may be asked for.")},
            "/v1/models/{id}": {"get": {**_get("Model", "One model.", "404"), "parameters": [_id(service)]}},
            "/v1/status": {"get": _answer("What the dashboard shows.", _object())},
            "/metrics": {"get": _answer("Prometheus' text.", {"text/plain": {"schema": {"type": "string"}}})},
            "/health": {"get": _answer("Whether this process is well; 503 if not.", _object("status"), "200", "503")},
            "/ready": {"get": _answer("Whether to send requests now; 503 if not.", _object("status"), "200", "503")},
            "/drain": {"post": _answer("Finish what runs, take nothing new, end.", _object("status"), "202")},
        },
        "components": {"schemas": _schemas(service), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }


def _schemas(service: Service) -> dict[str, Any]:
    wanted = [*((model, "validation") for model in ASKED), *((model, "serialization") for model in TOLD)]
    _, defined = models_json_schema(wanted, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas: dict[str, Any] = defined["$defs"]
    for model in ASKED:
        schemas[model.__name__]["properties"]["model"] = {"type": "string", "enum": service.models}
    return schemas


def _completion(asked: str, told: str, summary: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(asked)}}},
        "responses": {
            "200": {
                "description": "One object, or with `stream` a stream of server-sent events that ends with [DONE].",
                "content": {
                    "application/json": {"schema": _ref(told)},
                    "text/event-stream": {"schema": {"type": "string"}},
                },
            },
            **_refusals(*REFUSALS),
        },
    }


def _get(told: str, summary: str, *refusals: str) -> dict[str, Any]:
    about = _answer(summary, {"application/json": {"schema": _ref(told)}})
    return {**about, "responses": about["responses"] | _refusals(*refusals)}


def _answer(summary: str, content: dict[str, Any], *statuses: str) -> dict[str, Any]:
    told = {status: {"description": summary, "content": content} for status in statuses or ("200",)}
    return {"summary": summary, "responses": {**told, **_refusals("401", "403")}}


def _object(*required: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"type": "object", **({"required": [*required]} if required else {})}}}


def _refusals(*statuses: str) -> dict[str, Any]:
    told = {"application/json": {"schema": _ref("Failure")}}
    return {status: {"description": REFUSALS[status], "content": told} for status in statuses}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _id(service: Service) -> dict[str, Any]:
    return {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "enum": service.models}}
