"""From tokens to text, a piece at a time: what is shown is never taken back.

    tokens ─▶ Decoder ─▶ text that is complete ─▶ Stops ─▶ text that is no beginning of a stop string
              holds back half characters           holds back what may become one

What the pieces of an answer make together does not depend on how its tokens came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """Tokens of one answer become text."""

    def feed(self, token: int) -> str:
        """What `token` makes certain; "" while a character is not complete."""
        ...

    def finish(self) -> str:
        """What was held back. Nothing may be fed afterwards."""
        ...


class Stops:
    """Cuts text before the first of `stops`. Of stop strings that overlap, the one that is complete first
    counts; of those, the one that begins first."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Text that can be shown, and whether a stop string is complete: then it is all before it, and it is
        over. O(text × stops)."""
        if not self._stops:
            return text, False
        self._held += text
        found = [(at + len(each), at) for each in self._stops if (at := self._held.find(each)) >= 0]
        if found:
            return self._held[: min(found)[1]], True
        held = self._held
        keep = next(
            (n for n in range(min(self._longest - 1, len(held)), 0, -1) if self._begins(held[-n:])), 0
        )
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def _begins(self, tail: str) -> bool:
        return any(each.startswith(tail) for each in self._stops)

    def finish(self) -> str:
        """What was held back and has turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


class Answer:
    """The text of one answer as its tokens come. `enders` are tokens that end it and are not shown."""

    def __init__(self, decoder: Decoder, stops: Sequence[str], enders: frozenset[int]) -> None:
        self._decoder = decoder
        self._stops = Stops(stops)
        self._enders = enders
        self.tokens = 0
        """How many it has, up to the one that completed a stop string."""
        self.stopped = False
        """A stop string has been found; nothing comes any more."""

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` add."""
        pieces = []
        for token in tokens:
            if self.stopped:
                break
            self.tokens += 1
            if token not in self._enders:
                piece, self.stopped = self._stops.feed(self._decoder.feed(token))
                pieces.append(piece)
        return "".join(pieces)

    def finish(self) -> str:
        """The rest of the text, when no token comes any more."""
        if self.stopped:
            return ""
        piece, self.stopped = self._stops.feed(self._decoder.finish())
        return piece if self.stopped else piece + self._stops.finish()
