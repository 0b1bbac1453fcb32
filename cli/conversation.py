"""A conversation on a terminal: the agent's event loop in a thread of its own, the terminal in the main one.

So Ctrl-C is an ordinary KeyboardInterrupt here, and stops the answer that is being written and nothing else.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, Self, TypeVar

from pilotfish.cli.redis_url import described, redis_url
from pilotfish.cli.render import summary_line
from pilotfish.cli.requests import Pieces, PlainPrinter, TracePrinter
from pilotfish.cli.run import patient_agent
from pilotfish.cli.talk import say
from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.launch import open_agent, sampling
from pilotfish.edge_agent.text import Decoder
from pilotfish.protocol.errors import PilotfishError, UsageError
from pilotfish.protocol.messages import Prompt, Summary
from pilotfish.protocol.settings import Settings

T = TypeVar("T")
Turn = dict[str, str]  # role, content


class Conversation:
    """An agent and what was said so far. A context manager: the agent lives as long as the block."""

    def __init__(self, settings: Settings, system: str = "") -> None:
        self.settings, self.system = settings, system
        self.turns: list[Turn] = []
        self.forget()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="agent", daemon=True)
        self._running: Generation | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.agent = self._on_loop(self._open())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._on_loop(self.agent.stop())
        self._end()

    def _end(self) -> None:
        self._on_loop(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self) -> Agent:
        if self.settings.mode == "edge_only" or self.settings.privacy == "local_only":
            agent = await open_agent(self.settings, None)
        else:
            agent = await patient_agent(self.settings, redis_url(self.settings))
        await agent.start()
        return agent

    # --- turns -----------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Start over."""
        self.turns = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, text: str, show: Callable[[Pieces], None]) -> Summary:
        """One turn. KeyboardInterrupt stops the answer; what was said of it stays in the history."""
        answer = asyncio.run_coroutine_threadsafe(self._ask(text, show), self._loop)
        while True:
            try:
                return answer.result()
            except KeyboardInterrupt:
                self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._running:
            self._running.cancel()

    async def _ask(self, text: str, show: Callable[[Pieces], None]) -> Summary:
        turns = [*self.turns, {"role": "user", "content": text}]
        ids = await self.agent.encode(turns, chat=True, max_tokens=self.settings.max_tokens)
        generation = self.agent.open(replace(self.agent.task(self._prompt(text), ids), privacy=self.settings.privacy))
        self._running, said = generation, ""
        decoder = Decoder(self.agent.tokenizer.piece, self.agent.stop_ids)
        try:
            async with aclosing(generation.run()) as run:
                async for tokens in run:
                    pieces = [(decoder.feed(token.id), token.origin) for token in tokens]
                    said += "".join(piece for piece, _ in pieces)
                    show(pieces)
        finally:
            self._running = None
            self.agent.close(generation)
        self.turns = [*turns, {"role": "assistant", "content": said}]
        return generation.summary()

    def _prompt(self, text: str) -> Prompt:
        """The settings as a request's wishes; its text is not used, the turns are."""
        s = self.settings
        return Prompt(
            request="0" * 32, text=text, mode=s.mode, on_cloud_loss=s.on_cloud_loss, max_tokens=s.max_tokens,
            max_disagreement=s.max_disagreement, sampling=sampling(s), draft_tokens=s.draft_tokens,
            deadline_ms=s.deadline_ms,
        )  # fmt: skip


async def _cancel_others() -> None:
    """What is still under way, such as waiting for a worker when Ctrl-C came."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class Talk:
    """The terminal's side: read a line, show the answer."""

    def __init__(self, conversation: Conversation, *, trace: bool) -> None:
        self.conversation = conversation
        self.printer = TracePrinter() if trace else PlainPrinter()

    def run(self) -> None:
        """Until /exit or the end of input."""
        with suppress(ImportError):
            import readline  # noqa: F401  arrows and history for input()
        agent = self.conversation.agent
        redis = f", Redis: {described(self.conversation.settings)}"
        target = f"target {agent.target.name}{redis}" if agent.target else "alone"
        say(f"draft {agent.drafter.info.model}, {target}. /new starts over, /exit ends.")
        while (text := self._line()) is not None:
            if text == "/new":
                self.conversation.forget()
            elif text.startswith("/"):
                say("there is /new and /exit; a text does not begin with /")
            elif text:
                self._answer(text)

    def _line(self) -> str | None:
        """What was typed; None at the end. Ctrl-C clears the line, as in a shell."""
        while True:
            try:
                text = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                if sys.stdin.isatty():
                    say("")
                return None
            except KeyboardInterrupt:
                say("")
                continue
            return None if text == "/exit" else text

    def _answer(self, text: str) -> None:
        """Show one answer; an error ends the turn, a wrong setting the conversation."""
        try:
            summary = self.conversation.ask(text, self.printer.pieces)
        except UsageError as error:
            say(f"pilotfish: {error}. /new starts over")
            return
        except PilotfishError as error:
            print(flush=True)
            say(f"pilotfish: {error}")
            return
        print(flush=True)
        say(summary_line(summary))
