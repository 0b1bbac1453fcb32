"""The API as OpenAI's own client sees it, on the fake pair: nothing between them is faked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from http_rigs import MODEL, Served, alone, api
from rigs import draws

from pilotfish.cloud_worker.engines.fake import fake_logprob
from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.http.bodies import WISHES
from pilotfish.edge_agent.task import Task
from pilotfish.protocol.messages import Sampling

PROMPT = tuple(b"hello")
WARM = Sampling(temperature=1.0, seed=7)


def text(count: int, sampling: Sampling = WARM) -> str:
    return bytes(draws(PROMPT, count, sampling)).decode("utf-8", "replace")


@pytest.fixture
async def one() -> AsyncIterator[Served]:
    """A draft that writes what the target would: everything but who wrote it is as with a cloud, and faster."""
    async with alone("") as served:
        yield served


@pytest.fixture
async def both(redis_url: str) -> AsyncIterator[Served]:
    async with api(redis_url) as served:
        yield served


async def test_the_models_are_the_target_and_the_draft(one: Served) -> None:
    assert [model.id for model in (await one.client.models.list()).data] == [MODEL]
    assert (await one.client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await one.client.models.retrieve("gpt-5")


async def test_an_answer_is_the_targets_own_text_and_says_who_wrote_it(both: Served) -> None:
    answer = await both.chat(max_tokens=40, seed=7, temperature=1)
    (choice,) = answer.choices
    wrote = choice.pilotfish
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (text(40), "assistant", "length")
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 40 == wrote["accepted"] + wrote["corrected"] + wrote["continued"]
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == wrote["accepted"] > 0
    assert answer.usage.completion_tokens_details.rejected_prediction_tokens == wrote["drafted"] - wrote["accepted"]
    assert (wrote["mode"], wrote["seed"], wrote["rounds"] > 0) == ("exact", 7, True)


async def test_a_stream_says_the_same_in_the_form_the_client_expects(one: Served) -> None:
    stream = await one.chat(max_tokens=40, seed=7, temperature=1, stream=True, stream_options={"include_usage": True})
    first, *middle, finish, used = [chunk async for chunk in stream]
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content for chunk in middle) == text(40)
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in [first, *middle])
    assert (finish.choices[0].finish_reason, finish.choices[0].delta.content) == ("length", None)
    assert finish.choices[0].pilotfish["tokens"] == 40
    assert (used.choices, used.usage.total_tokens) == ([], 45)
    assert len({chunk.id for chunk in [first, *middle, finish, used]}) == 1


async def test_without_being_asked_a_stream_tells_no_usage(one: Served) -> None:
    chunks = [chunk async for chunk in await one.chat(stream=True)]
    assert all(len(chunk.choices) == 1 and "usage" not in chunk.model_fields_set for chunk in chunks)


async def test_completions_have_their_own_type_whole_and_streamed(one: Served) -> None:
    whole = await one.complete(seed=7, temperature=1)
    chunks = [chunk async for chunk in await one.complete(seed=7, temperature=1, stream=True)]
    assert {whole.object, *(chunk.object for chunk in chunks)} == {"text_completion"}
    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks) == text(20)
    assert (whole.choices[0].finish_reason, chunks[-1].choices[0].finish_reason) == ("length", "length")


async def test_several_prompts_and_choices_are_numbered_in_order(one: Served) -> None:
    answer = await one.complete(prompt=["hello", "other"], n=2, seed=7, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == text(20)
    assert answer.usage.prompt_tokens == 10
    assert len({choice.text for choice in answer.choices}) == 4
    seeds = [choice.pilotfish["seed"] for choice in answer.choices]
    assert seeds[0] == seeds[2] == 7 != seeds[1] == seeds[3]
    again = await one.complete(n=1, seed=seeds[1], temperature=1)
    assert again.choices[0].text == answer.choices[1].text, "a choice can be asked for again by its seed"


async def test_the_seed_that_was_drawn_is_told(one: Served) -> None:
    first = await one.chat(temperature=1)
    again = await one.chat(temperature=1, seed=first.choices[0].pilotfish["seed"])
    assert again.choices[0].message.content == first.choices[0].message.content


async def test_log_probabilities_are_the_targets_own(both: Served) -> None:
    answer = await both.chat(seed=7, temperature=1, logprobs=True)
    content = answer.choices[0].logprobs.content
    assert [token.logprob for token in content] == [fake_logprob(token) for token in draws(PROMPT, 20, WARM)]
    assert bytes(byte for token in content for byte in token.bytes) == bytes(draws(PROMPT, 20, WARM))
    assert "".join(token.token for token in content) == text(20)
    chunks = [chunk async for chunk in await both.chat(seed=7, temperature=1, logprobs=True, stream=True)]
    streamed = [token for chunk in chunks for token in (chunk.choices[0].logprobs or NOTHING).content]
    assert streamed == content
    plain = await both.complete(seed=7, temperature=1, logprobs=0)
    assert plain.choices[0].logprobs.token_logprobs == [token.logprob for token in content]
    assert plain.choices[0].logprobs.text_offset[-1] <= len(text(20))


class NOTHING:
    content: tuple[Any, ...] = ()


async def test_a_token_the_target_never_saw_has_no_log_probability(both: Served) -> None:
    answer = await both.chat(logprobs=True, extra_body={"pilotfish": {"mode": "edge_only"}})
    assert {token.logprob for token in answer.choices[0].logprobs.content} == {None}
    assert answer.choices[0].pilotfish["local"] == 20


async def test_every_wish_of_our_block_reaches_the_generation(both: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    wish = {"mode": "gated", "max_disagreement": 0.25, "privacy": "local_only", "on_cloud_loss": "local",
            "draft_tokens": 3, "deadline_ms": 9000}  # fmt: skip
    begun, agent = list[Task](), both.service.agent
    open_ = agent.open

    def opened(task: Task, *more: Any) -> Generation:
        begun.append(task)
        return open_(task, *more)

    monkeypatch.setattr(agent, "open", opened)
    answer = await both.chat(logprobs=True, extra_body={"pilotfish": wish})
    assert set(wish) == set(WISHES)
    assert all(getattr(begun[0], name) == value for name, value in wish.items() if name != "deadline_ms")
    assert 8000 < begun[0].deadline_ms <= 9000, "what it waited for a place is gone"
    assert answer.choices[0].pilotfish["never_sent"] == 20


@pytest.mark.parametrize("streams", [False, True])
async def test_a_stop_string_across_tokens_ends_the_text_and_never_leaks(one: Served, streams: bool) -> None:
    whole = text(60)
    stop = whole[21:24]
    before = whole[: whole.index(stop)]
    answer = await one.chat(max_tokens=60, seed=7, temperature=1, stop=["never", stop], stream=streams)
    if streams:
        chunks = [chunk async for chunk in answer]
        said, last = "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1]
    else:
        said, last = answer.choices[0].message.content, answer
    assert said == before
    assert last.choices[0].finish_reason == "stop"
    assert last.choices[0].pilotfish["tokens"] < 60


async def test_a_half_finished_stop_string_is_text_after_all(one: Served) -> None:
    whole = text(20)
    answer = await one.chat(seed=7, temperature=1, stop=whole[-1] + "x")
    assert answer.choices[0].message.content == whole


async def test_characters_of_several_bytes_are_never_cut() -> None:
    words = "für 3 € 🐟 "
    async with alone(words) as one:
        chunks = [chunk async for chunk in await one.chat(max_tokens=len(words.encode()) * 5, stream=True)]
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert len(pieces) > 10
    assert "�" not in "".join(pieces[2:-2])
    assert words in "".join(pieces)


async def test_a_character_that_stays_unfinished_is_not_lost() -> None:
    async with alone("aaaaaaaa€") as one:  # five letters of prompt, then "aaa" and one byte of three
        answer = await one.chat(max_tokens=4)
    assert answer.choices[0].message.content == "aaa�"


@pytest.mark.parametrize(
    ("wish", "status", "code", "param"),
    [
        ({"model": "gpt-5"}, 404, "model_not_found", "model"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "empty_prompt", "messages"),
        ({"max_tokens": 5000}, 400, "context_length_exceeded", "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "unsupported_parameter", "tools"),
        ({"temperature": -1}, 400, "bad_request", "temperature"),
        ({"extra_body": {"pilotfish": {"mood": "gay"}}}, 400, "unsupported_parameter", "pilotfish.mood"),
        ({"stream_options": {"include_usage": True}, "stream": False}, 400, "bad_request", "stream_options"),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
async def test_a_request_that_cannot_be_served_is_refused_in_openais_words(
    wish: dict[str, Any], status: int, code: str, param: str, streams: bool
) -> None:
    async with alone() as one:
        with pytest.raises(openai.APIStatusError) as caught:
            await one.chat(**{"stream": streams, **wish})
    assert (caught.value.status_code, caught.value.code, caught.value.param) == (status, code, param)
    assert caught.value.type == "invalid_request_error"


async def test_ten_clients_at_once_are_all_answered(both: Served) -> None:
    async def ask(number: int) -> str:
        stream = await both.chat(user=f"u{number}", seed=number, temperature=1, max_tokens=60, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    got = await asyncio.wait_for(asyncio.gather(*map(ask, range(10))), 30)
    assert got == [text(60, Sampling(temperature=1.0, seed=number)) for number in range(10)]
