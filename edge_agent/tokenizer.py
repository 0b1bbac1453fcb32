"""Text to ids and back with the draft's own vocabulary, and the target's chat template.

The pair check at start made sure that draft and target read every id as the same bytes, so either side's tokenizer
serves both; the template is the target's, because the target decides what the text is.
"""

from __future__ import annotations

import re
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
        if any(self._imitates(turn["content"]) for turn in turns):
            return self._encode_apart(turns)
        return self.model.tokenize(self._render(turns), special=True)

    def _render(self, turns: Turns) -> str:
        if self.chat_template:
            return render_chat(self.chat_template, turns)
        return self.model.apply_chat_template(turns)

    def _imitates(self, content: str) -> bool:
        """Whether a text spells a special token."""
        read = self.model.tokenize(content, special=True, opening=False)
        return read != self.model.tokenize(content, opening=False)

    def _encode_apart(self, turns: Turns) -> list[int]:
        """The template around stand-ins is read with special tokens, what people wrote without."""
        stands = [f"\ue000{index}\ue001" for index in range(len(turns))]
        rendered = self._render([{**turn, "content": stand} for turn, stand in zip(turns, stands, strict=True)])
        ids: list[int] = []
        for index, part in enumerate(re.split("\ue000(\\d+)\ue001", rendered)):
            written = index % 2 == 1  # every second part is the number of a stand-in
            text = turns[int(part)]["content"] if written else part
            ids += self.model.tokenize(text, special=not written, opening=False)
        return ids

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
