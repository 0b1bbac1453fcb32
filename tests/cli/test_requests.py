"""submit, result and cancel against a worker and an agent on the fake pair."""

from __future__ import annotations

import asyncio
import json

import pytest
from redis.asyncio import Redis

from helpers import wait_until
from pilotfish.cli import requests
from pilotfish.cli.requests import Answer, Pieces, failure
from pilotfish.cli.submit import checked, new_prompt, prompt_text
from pilotfish.protocol import errors, keys
from pilotfish.protocol.errors import AnswerLost, Cancelled, EmptyPrompt, NoAgent, PilotfishError, UsageError
from pilotfish.protocol.messages import Accepted, CancelRequest, Failed, Finished, Prompt, Summary, Text
from pilotfish.protocol.settings import Settings, load
from pilotfish.protocol.shell import ShellBroker

ID = "0" * 32


class Silent:
    """A printer that remembers."""

    def __init__(self) -> None:
        self.shown, self.ends = "", 0

    def pieces(self, new: Pieces) -> None:
        self.shown += "".join(piece for piece, _ in new)

    def end(self, answer: Answer) -> None:
        self.ends += 1


def prompt(settings: Settings, text: str = "once upon", **update: object) -> Prompt:
    wish = settings.model_copy(update={"max_tokens": 40, "seed": 7, **update})
    return new_prompt(wish, text, raw=False)


# --- a request -----------------------------------------------------------------------------------------------


async def test_an_answer_is_streamed_and_counted(rig: Settings) -> None:
    shown = Silent()
    answer = await requests.submit(rig, prompt(rig), shown)
    assert answer.text == shown.shown
    assert len(answer.ids) == len(answer.said) == 40
    assert answer.summary
    assert answer.summary.tokens == 40
    assert shown.ends == 1


async def test_exact_and_cloud_only_say_the_same(rig: Settings) -> None:
    exact = await requests.submit(rig, prompt(rig, temperature=1.0), Silent())
    cloud = await requests.submit(rig, prompt(rig, temperature=1.0, mode="cloud_only"), Silent())
    assert exact.ids == cloud.ids


async def test_a_result_is_kept(rig: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    sent = prompt(rig)
    await requests.send(rig, sent)
    shown = Silent()
    await requests.result(rig, sent.request, shown, to_end=True)
    again = Silent()
    await requests.result(rig, sent.request, again, to_end=False)
    assert shown.shown == again.shown != ""


async def test_cancelling_the_shell_cancels_the_request(rig: Settings, redis: Redis) -> None:
    sent, shown = prompt(rig, max_tokens=3000, draft_tokens=1), Silent()
    task = asyncio.create_task(requests.submit(rig, sent, shown))
    await wait_until(lambda: shown.shown, "first text")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(Cancelled):
        await requests.result(rig, sent.request, Silent(), to_end=True)


async def test_cancel_by_id(rig: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    sent = prompt(rig, max_tokens=3000, draft_tokens=1)
    await requests.send(rig, sent)
    await requests.cancel(rig, sent.request)
    with pytest.raises(Cancelled):
        await requests.result(rig, sent.request, Silent(), to_end=True)
    await requests.cancel(rig, sent.request)
    assert "is over already" in capsys.readouterr().err


async def test_an_agents_error_is_ours(rig: Settings) -> None:
    with pytest.raises(PilotfishError, match="exceed the context") as told:
        await requests.submit(rig, prompt(rig, "word " * 2000), Silent())
    assert told.value.exit_code == 2


async def test_without_an_agent_it_fails_at_once(redis_url: str, redis: Redis) -> None:
    settings = Settings(redis_url=redis_url)
    async with asyncio.timeout(2):
        with pytest.raises(NoAgent, match="pilotfish agent"):
            await requests.submit(settings, prompt(settings), Silent())


async def test_a_request_nobody_took_is_withdrawn(redis_url: str, redis: Redis) -> None:
    settings = Settings(redis_url=redis_url)
    seconds, _ = await redis.time()
    await redis.xgroup_create(keys.prompts("default"), keys.GROUP_AGENTS, mkstream=True)
    await redis.zadd(keys.agents("default"), {"busy": seconds * 1000})
    for key in (keys.prompts("default"), keys.agents("default")):
        await redis.pexpire(key, keys.JOBS_TTL_MS)
    sent = prompt(settings)
    await requests.send(settings, sent)
    await requests.cancel(settings, sent.request)
    with pytest.raises(Cancelled):
        await requests.result(settings, sent.request, Silent(), to_end=False)


async def test_an_unknown_request_is_refused(redis_url: str, redis: Redis) -> None:
    for look in (requests.result(Settings(redis_url=redis_url), ID, Silent(), to_end=False),
                 requests.cancel(Settings(redis_url=redis_url), ID)):  # fmt: skip
        with pytest.raises(UsageError, match="nobody knows"):
            await look


async def test_an_unfinished_result_says_so(redis_url: str, redis: Redis) -> None:
    shell = ShellBroker(redis, "default")
    await shell.withdraw(ID, Accepted(request=ID, agent="edge1", prompt_tokens=3, seed=1))
    with pytest.raises(PilotfishError, match="result --wait"):
        await requests.result(Settings(redis_url=redis_url), ID, Silent(), to_end=False)


# --- an answer -----------------------------------------------------------------------------------------------


def text(start: int, *words: str) -> Text:
    ids = tuple(range(start, start + len(words)))
    return Text(request=ID, start=start, ids=ids, pieces=words, origins=("accepted",) * len(words))


def test_an_agent_that_took_over_says_nothing_twice() -> None:
    answer = Answer(ID)
    assert answer.add(Accepted(request=ID, agent="edge1", prompt_tokens=1, seed=1)) == []
    answer.add(text(0, "a", "b"))
    answer.add(Accepted(request=ID, agent="edge2", prompt_tokens=1, seed=1))
    assert answer.add(text(0, "a", "b", "c")) == [("c", "accepted")]
    assert answer.add(text(3, "d")) == [("d", "accepted")]
    assert (answer.text, answer.ids, answer.agent) == ("abcd", [0, 1, 2, 3], "edge2")


@pytest.mark.parametrize(("start", "words"), [(3, ("d",)), (1, ("c", "d"))])
def test_a_text_that_does_not_join_on_is_no_answer(start: int, words: tuple[str, ...]) -> None:
    """Redis lost a part, or an agent that took over wrote something else."""
    answer = Answer(ID)
    answer.add(text(0, "a", "b"))
    other = text(start, *words).model_copy(update={"ids": tuple(range(start + 7, start + 7 + len(words)))})
    with pytest.raises(AnswerLost, match="submit it again"):
        answer.add(other)
    assert answer.text == "ab"


@pytest.mark.parametrize(
    ("code", "exit_code"), [("too_long", 2), ("deadline", 3), ("engine_failed", 1), ("job_refused", 3), ("new", 1)]
)
def test_a_failure_has_the_exit_code_of_its_kind(code: str, exit_code: int) -> None:
    error = failure(Failed(request=ID, code=code, sentence="why"))
    assert (str(error), error.code, error.exit_code) == ("why", code, exit_code)
    assert errors.PilotfishError.exit_code == 1


def test_plain_text_goes_to_stdout_and_figures_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    answer, printer = Answer(ID), requests.printer(as_json=False, trace=False)
    printer.pieces(answer.add(text(0, "a\x1b", "b")))
    answer.add(Finished(request=ID, reason="stop", summary=Summary(tokens=2, seed=9)))
    printer.end(answer)
    told = capsys.readouterr()
    assert told.out == "a\x1bb\n"  # as it is: nobody's terminal
    assert told.err == "2 tokens · 0 ms (first 0 ms) · seed 9\n"


def test_a_trace_off_a_terminal_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    answer, printer = Answer(ID), requests.printer(as_json=False, trace=True)
    printer.pieces(answer.add(text(0, "a ", "b")))
    printer.end(answer)
    told = capsys.readouterr()
    assert (told.out, told.err) == ("a b\n", "trace: accepted  corrected  continued  local\n")


@pytest.mark.parametrize("trace", [False, True])
def test_json_is_one_object(trace: bool, capsys: pytest.CaptureFixture[str]) -> None:
    answer, printer = Answer(ID), requests.printer(as_json=True, trace=trace)
    printer.pieces(answer.add(text(0, "a", "é")))
    answer.add(Finished(request=ID, reason="stop", summary=Summary(tokens=2, accepted=2)))
    printer.end(answer)
    body = json.loads(capsys.readouterr().out)
    assert (body["text"], body["reason"], body["summary"]["acceptance"]) == ("aé", "stop", 1.0)
    assert body.get("tokens") == ([{"id": 0, "text": "a", "origin": "accepted"},
                                   {"id": 1, "text": "é", "origin": "accepted"}] if trace else None)  # fmt: skip


# --- what was given ------------------------------------------------------------------------------------------


def test_a_prompt_is_text_or_file_or_standard_input(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    from pathlib import Path

    Path("question.txt").write_text("what?")
    monkeypatch.setattr("sys.stdin", io.StringIO("piped"))
    assert prompt_text("hello", literal=False) == "hello"
    assert prompt_text("question.txt", literal=False) == "what?"
    assert prompt_text("question.txt", literal=True) == "question.txt"
    assert prompt_text("-", literal=False) == "piped"
    Path("picture.png").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"picture\.png is not UTF-8"):
        prompt_text("picture.png", literal=False)
    with pytest.raises(EmptyPrompt):
        prompt_text(" \n", literal=False)


def test_settings_become_the_requests_wishes() -> None:
    given = load({"temperature": 0.5, "seed": 3, "mode": "cloud_only"}, environ={})
    sent = new_prompt(given, "hi", raw=True)
    assert (sent.sampling.temperature, sent.sampling.seed, sent.mode, sent.raw) == (0.5, 3, "cloud_only", True)
    assert sent.draft_tokens is None, "the agent's own, unless asked for"
    assert new_prompt(load({"draft_tokens": 2}, environ={}), "hi", raw=False).draft_tokens == 2
    with pytest.raises(UsageError, match="Shorten"):
        new_prompt(given, "a" * 1_000_001, raw=False)


@pytest.mark.parametrize("wrong", ["", "0" * 31, "G" * 32, "../../etc"])
def test_what_is_no_id_is_refused(wrong: str) -> None:
    checked(ID)
    with pytest.raises(UsageError):
        checked(wrong)


def test_cancel_is_sent_where_it_is_read() -> None:
    assert CancelRequest(request=ID).type == "cancel_request"
