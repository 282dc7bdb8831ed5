"""A request's text as its tokens come, which ends at a stop string. Callers advance the engine; this reads requests."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemma2_jax.inference.engine import Reason, Request
from gemma2_jax.inference.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Completion:
    """The text that continues a prompt.

    A stop string is left out, and so is what comes after it; text that may be the beginning of one is held back. The
    request is canceled when one is found, so that it leaves its slot.
    """

    def __init__(self, request: Request, tokenizer: "PreTrainedTokenizerFast", stop: Sequence[str] = ()):
        self.request = request
        self.text = ""  # that was given so far
        self.pieces: list[str] = []  # of the text, that each token completes; what is left out of the text too
        self.reason: Reason | None = None  # why the text has ended
        self._stream = TextStream(tokenizer)
        self._stop = [string for string in stop if string]
        self._end: int | None = None  # where a stop string begins

    def take(self) -> str:
        """The text that has come since the last call."""
        for token in self.request.tokens[len(self.pieces) :]:
            if self.reason is None:
                self.pieces.append(self._stream.add(token))
                self._find_stop(len(self.pieces[-1]))
        if self.reason is None and self.request.reason is not None:
            rest = self._stream.flush()
            self.pieces[-1:] = [piece + rest for piece in self.pieces[-1:]]
            self._find_stop(len(rest))
            self.reason = self.reason or self.request.reason
        whole = self._stream.text
        withheld = 0 if self.reason else self._count_held()
        new = whole[len(self.text) : len(whole) - withheld if self._end is None else self._end]
        self.text += new
        return new

    def _find_stop(self, new: int) -> None:
        """Ends the text at the first stop string that the last `new` characters complete."""
        text = self._stream.text
        found = [text.find(stop, max(0, len(text) - new - len(stop) + 1)) for stop in self._stop] if new else []
        if begins := [place for place in found if place >= 0]:
            self._end, self.reason = min(begins), "stop"
            self.request.is_canceled = self.request.reason is None

    def _count_held(self) -> int:
        """How many characters at the end of the text may be the beginning of a stop string."""
        text, longest = self._stream.text, max(map(len, self._stop), default=0)
        sizes = range(min(longest - 1, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stop)), 0)
