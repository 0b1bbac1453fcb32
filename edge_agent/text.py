"""Token ids to text, one token at a time, without ever cutting a character in two."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection


class Decoder:
    """Feeds a generation's tokens; a token that ends inside a character yields what is complete, and the rest later."""

    def __init__(self, piece: Callable[[int], bytes], silent: Collection[int] = ()) -> None:
        self._piece, self._silent = piece, silent
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Text that became complete with this token; stop tokens are silent."""
        return self._utf8.decode(b"" if token in self._silent else self._piece(token))

    def end(self) -> str:
        """The text is over: what an unfinished character left behind, as U+FFFD."""
        return self._utf8.decode(b"", final=True)
