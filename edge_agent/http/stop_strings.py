"""Stop strings over a stream of text pieces: nothing of one ever leaks, nothing before it is ever lost.

Pure. The result depends on the text alone, not on how it was cut into pieces: the stop string that is complete first
ends the text; of several that end together, the longest.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Feed pieces, give out what is returned; once `stopped`, everything further is dropped."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """Text that can no longer become part of a stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        if (cut := self._first_match(text)) is not None:
            self.stopped, self._held = True, ""
            return text[:cut]
        keep = self._beginnings(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """The text is over: what was held back was no stop string after all."""
        rest, self._held = self._held, ""
        return rest

    def _first_match(self, text: str) -> int | None:
        """Where the stop string begins that is complete first."""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _beginnings(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops), default=0))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0)
