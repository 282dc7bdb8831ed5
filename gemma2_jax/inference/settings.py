"""What is asked for where text is generated: which tokens are drawn, and how. Options of commands, read without JAX.

`sampling` does what they say.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

_LOWEST_TEMPERATURE = 1e-6  # a logit over less would come near the end of float32, and none differs from 0
MOST_BIASES = 300  # tokens of one request whose logits are biased: as many as OpenAI's API takes


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of a text are chosen. Its draws depend on the seed and on nothing else in the batch."""

    temperature: float = 0.0  # logits are divided by it; 0 takes the most likely token
    top_k: int | None = None  # draw from the k most likely tokens
    top_p: float | None = None  # draw from the fewest most likely of those whose probabilities sum up to this
    min_p: float | None = None  # of those, from the ones with at least this share of the most likely one's probability
    repetition_penalty: float = 1.0  # divides positive logits of tokens in prompt and text, multiplies negative ones
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the text so far
    frequency_penalty: float = 0.0  # subtracted from them for each time that they occur in the text so far
    logit_bias: tuple[tuple[int, float], ...] = ()  # tokens, and what is added to their logits
    seed: int = 0  # of the draws

    def __post_init__(self) -> None:
        if self.temperature != 0 and not _LOWEST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}; use 0 for the most likely token, or a finite number of at least "
                f"{_LOWEST_TEMPERATURE}"
            )
        if self.top_k is not None and not 1 <= self.top_k < 2**31:
            raise ValueError(
                f"top_k is {self.top_k}; it must be at least 1 and below 2**31, or unset to draw from all tokens"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1, or unset")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be at least 0 and at most 1, or unset")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0 and finite, and 1 is none"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number, and 0 is none")
        if len(self.logit_bias) > MOST_BIASES:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} tokens; give {MOST_BIASES} at most")
        for token, bias in self.logit_bias:
            if not 0 <= token < 2**31 or math.isnan(bias):
                raise ValueError(f"logit_bias has {bias} for token {token}; give numbers for the model's own tokens")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}; it must be at least 0 and below 2**31")

    def list_idle(self) -> list[str]:
        """Settings of draws, where at temperature 0 none is made."""
        names = ("top_k", "top_p", "min_p", "seed") if self.temperature == 0 else ()
        return [name for name in names if getattr(self, name) not in (None, 0)]


GREEDY = Sampling()

# What a line of a file, or a command of the chat, may change: numbers, and whether they are whole.
NUMBERS = {
    "max_new_tokens": True,
    "temperature": False,
    "top_k": True,
    "top_p": False,
    "min_p": False,
    "repetition_penalty": False,
    "presence_penalty": False,
    "frequency_penalty": False,
    "seed": True,
}


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How texts are generated, besides the prompt."""

    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()  # a text ends before any of these
    samples: int = 1  # texts of each prompt

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not all(isinstance(string, str) and string for string in self.stop):
            raise ValueError(f"stop is {reprlib.repr(self.stop)}; give strings that are not empty")
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; it must be at least 1")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"samples is {self.samples}, and at temperature 0 all of them are alike; set a temperature, as 1"
            )

    def change(self, changes: Mapping[str, Any]) -> "TextSettings":
        """The settings with what `changes` has under the names of `NUMBERS`; it may have others. None is the default.

        Raises ValueError for what is no such number.
        """
        changed = {name: changes[name] for name in NUMBERS if name in changes}
        for name, value in changed.items():
            if value is None:
                changed[name] = getattr(GREEDY, name, self.max_new_tokens)
            elif type(value) is not int and (NUMBERS[name] or type(value) is not float):
                kind = "a whole number" if NUMBERS[name] else "a number"
                raise ValueError(f"{name} is {reprlib.repr(value)}; it must be {kind}")
        max_new_tokens = changed.pop("max_new_tokens", self.max_new_tokens)
        return replace(self, max_new_tokens=max_new_tokens, sampling=replace(self.sampling, **changed))
