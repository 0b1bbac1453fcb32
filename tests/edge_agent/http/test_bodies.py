from __future__ import annotations

import json
from typing import Any

import pytest

from pilotfish.edge_agent.http.bodies import NEUTRAL, ChatBody, CompletionBody, read
from pilotfish.protocol.errors import Unsupported, UsageError
from pilotfish.protocol.messages import Prompt

HI = {"role": "user", "content": "hi"}
TEXT = {"type": "text", "text": "a"}


def chat(**more: Any) -> ChatBody:
    return read(ChatBody, json.dumps({"model": "m", "messages": [HI], **more}).encode())


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"audio": {}}, "audio"),
        ({"pilotfish": {"privat": True}}, "pilotfish.privat"),
        ({"messages": [{**HI, "name": "me"}]}, "messages[0].name"),
        ({"messages": [HI, {"role": "user", "content": [TEXT | {"x": 1}]}]}, "messages[1].content[0].x"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"guided_grammar": "root ::= 'a'"}, "guided_grammar"),
        ({"stop_token_ids": [7]}, "stop_token_ids"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_its_name(more: dict[str, Any], param: str) -> None:
    with pytest.raises(Unsupported) as caught:
        chat(**more)
    assert caught.value.param == param
    assert str(caught.value).startswith(f"{param} is not supported here")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stream": "true"}, "stream"),
        ({"seed": 2**64}, "seed"),
        ({"pilotfish": {"mode": "guess"}}, "pilotfish.mode"),
        ({"pilotfish": {"draft_tokens": 9999}}, "pilotfish.draft_tokens"),
    ],
)
def test_an_impossible_value_is_refused_with_its_place(more: dict[str, Any], param: str) -> None:
    with pytest.raises(UsageError) as caught:
        chat(**more)
    assert (type(caught.value), caught.value.param) == (UsageError, param)


def test_values_that_ask_for_nothing_are_taken_as_many_clients_send_them() -> None:
    body = chat(
        frequency_penalty=0, presence_penalty=0.0, logit_bias={}, tools=[], tool_choice="none", store=False, user="me",
        response_format={"type": "text"}, modalities=["text"], service_tier="auto", top_logprobs=0, metadata={},
        n=None, stop=None, seed=None, functions=[], parallel_tool_calls=True,
    )  # fmt: skip
    assert (body.choices, body.stops) == (1, ())


def test_the_neutral_parameters_are_parameters() -> None:
    known = {*ChatBody.model_fields, *CompletionBody.model_fields, "include_obfuscation"}
    assert known >= NEUTRAL


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "\\ud800"}'])
def test_what_is_no_object_is_told_so(data: bytes) -> None:
    with pytest.raises(UsageError, match="the body is no"):
        read(ChatBody, data)


def test_a_conversation_becomes_turns() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    body = chat(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    assert body.prompts == [[{"role": "system", "content": "be brief"}, {"role": "user", "content": "one two"}]]


def test_our_block_sets_fields_of_a_prompt() -> None:
    wishes = chat(pilotfish={"mode": "cloud_only", "draft_tokens": 2, "on_cloud_loss": None}).wishes
    assert wishes == {"mode": "cloud_only", "draft_tokens": 2}
    Prompt(request="0" * 32, text="-", **wishes)
