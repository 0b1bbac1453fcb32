"""Text to ids and back with the draft's own vocabulary, and the target's chat template.

The pair check at start made sure that draft and target read every id as the same bytes, so either side's tokenizer
serves both; the template is the target's, because the target decides what the text is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from pilotfish.cache.chat_template import render_chat
from pilotfish.cache.llama_context import LlamaModel

Turns = Sequence[Mapping[str, str]]  # a conversation so far: {role, content} each, the user's last


class Tokenizer(Protocol):
    """What an agent needs of a tokenizer."""

    def encode(self, text: str | Turns, *, chat: bool) -> list[int]:
        """Token ids of a text; with `chat`, of the conversation in which the user says it, or of the turns given."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes an id stands for; control tokens have none."""
        ...


class LlamaTokenizer:
    """A GGUF model's tokenizer; `chat_template` overrides the one in the file."""

    def __init__(self, model: LlamaModel, chat_template: str = "") -> None:
        self.model, self.chat_template = model, chat_template

    def encode(self, text: str | Turns, *, chat: bool) -> list[int]:
        """Special tokens are read in the template only: a user who types one gets its letters."""
        if not chat and isinstance(text, str):
            return self.model.tokenize(text)
        turns = [{"role": "user", "content": text}] if isinstance(text, str) else text
        template = self.chat_template
        rendered = render_chat(template, turns) if template else self.model.apply_chat_template(turns)
        return self.model.tokenize(rendered, special=True)

    def piece(self, token: int) -> bytes:
        """See `Tokenizer.piece`."""
        return self.model.piece(token)


class ByteTokenizer:
    """Ids are bytes: for the fake pair, whose vocabulary is the 256 byte values."""

    def encode(self, text: str | Turns, *, chat: bool) -> list[int]:
        """UTF-8; of a conversation, its last turn."""
        return list((text if isinstance(text, str) else text[-1]["content"]).encode())

    def piece(self, token: int) -> bytes:
        """One byte."""
        return bytes([token % 256])


def byte_vocabulary() -> Sequence[bytes]:
    """The 256 byte values, in order."""
    return [bytes([value]) for value in range(256)]
