"""Texts as OpenAI's API writes them: whole, or in the chunks of a stream."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from gemma2_jax.inference.engine import TokenScore
from gemma2_jax.inference.http.models import ServedModel, Words
from gemma2_jax.inference.service import Choice, Progress
from gemma2_jax.inference.text import TextStream

type Json = dict[str, Any]

_NONE = Progress()


class Form(Protocol):
    """How one kind of request is answered."""

    prefix: str  # of the answer's id
    whole: str  # what an answer calls itself
    chunk: str  # and a chunk of one

    def open(self) -> Json | None:
        """What the first chunk of each text says before there is any."""
        ...

    def write(self, choice: Choice, since: Progress, now: Progress, *, is_chunk: bool) -> Json:
        """What has come of a text between two moments."""
        ...


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one request."""

    model: ServedModel
    form: Form
    choices: Sequence[Choice]
    samples: int  # of each prompt
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: secrets.token_hex(12))

    def write(self) -> Json:
        """All of it, at the end."""
        choices = [
            {"index": index, **self.form.write(choice, _NONE, choice.progress, is_chunk=False)}
            for index, choice in enumerate(self.choices)
        ]
        return self._envelope(self.form.whole, choices) | {"usage": self.count_usage()}

    def open_chunks(self) -> list[Json]:
        """Chunks that come before any text."""
        opening = self.form.open()
        if opening is None:
            return []
        return [self._write_chunk({"index": index, **opening}) for index in range(len(self.choices))]

    def write_chunk(self, index: int, since: Progress, now: Progress) -> Json:
        """The chunk of a text between two moments."""
        return self._write_chunk({"index": index, **self.form.write(self.choices[index], since, now, is_chunk=True)})

    def write_usage(self) -> Json:
        """The chunk that says how many tokens there were."""
        return self._envelope(self.form.chunk, []) | {"usage": self.count_usage()}

    def count_usage(self) -> Json:
        prompts = [len(choice.request.prompt) for choice in self.choices[:: self.samples]]
        new = [len(choice.completion.pieces) for choice in self.choices]
        reused = [choice.request.reused for choice in self.choices[:: self.samples]]
        return {
            "prompt_tokens": sum(prompts),
            "completion_tokens": sum(new),
            "total_tokens": sum(prompts) + sum(new),
            "prompt_tokens_details": {"cached_tokens": sum(reused)},
        }

    def _write_chunk(self, choice: Json) -> Json:
        return self._envelope(self.form.chunk, [choice])

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": f"{self.form.prefix}-{self.number}",
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
        }


@dataclass(frozen=True, kw_only=True)
class ChatForm:
    """As POST /v1/chat/completions answers."""

    words: Words
    prefix = "chatcmpl"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def open(self) -> Json:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def write(self, choice: Choice, since: Progress, now: Progress, *, is_chunk: bool) -> Json:
        text = choice.completion.text[since.characters : now.characters]
        delta = {"content": text} if text or not is_chunk else {}
        message = {"delta": delta} if is_chunk else {"message": {"role": "assistant", **delta, "refusal": None}}
        return {**message, "logprobs": self._write_scores(choice, since, now), "finish_reason": now.reason}

    def _write_scores(self, choice: Choice, since: Progress, now: Progress) -> Json | None:
        if choice.request.alternatives is None:
            return None
        tokens = choice.request.tokens[since.tokens : now.tokens]
        scores = choice.request.scores[since.tokens : now.tokens]
        return {
            "content": [
                self._write_token(token, score.value)
                | {"top_logprobs": [self._write_token(*other) for other in score.alternatives]}
                for token, score in zip(tokens, scores, strict=True)
            ],
            "refusal": None,
        }

    def _write_token(self, token: int, value: float) -> Json:
        return {"token": self.words.text_of(token), "logprob": value, "bytes": list(self.words.bytes_of(token))}


@dataclass(frozen=True, kw_only=True)
class CompletionForm:
    """As POST /v1/completions answers; with `echo`, texts begin with their prompts."""

    model: ServedModel
    echo: bool
    has_scores: bool
    prefix = "cmpl"
    whole = chunk = "text_completion"

    def open(self) -> None:
        return None

    def write(self, choice: Choice, since: Progress, now: Progress, *, is_chunk: bool) -> Json:
        text = choice.completion.text[since.characters : now.characters]
        is_first = since == _NONE
        prompt = self._cut_prompt(choice) if self.echo else []
        scores = self._write_scores(choice, prompt, since, now, is_first=is_first) if self.has_scores else None
        text = "".join([*prompt, text]) if is_first else text
        return {"text": text, "logprobs": scores, "finish_reason": now.reason}

    def _cut_prompt(self, choice: Choice) -> list[str]:
        """The prompt's text, in pieces that its tokens complete."""
        stream = TextStream(self.model.tokenizer)
        pieces = [stream.add(token) for token in choice.request.prompt]
        return [*pieces[:-1], pieces[-1] + stream.flush()]

    def _write_scores(
        self, choice: Choice, prompt: list[str], since: Progress, now: Progress, *, is_first: bool
    ) -> Json:
        request = choice.request
        tokens, values = request.tokens[since.tokens : now.tokens], request.scores[since.tokens : now.tokens]
        begin = sum(map(len, [*prompt, *choice.completion.pieces[: since.tokens]]))
        pieces = choice.completion.pieces[since.tokens : now.tokens]
        scores: list[TokenScore | None] = [*values]
        if is_first and prompt:
            tokens, pieces, begin = [*request.prompt, *tokens], [*prompt, *pieces], 0
            scores = [None, *request.prompt_scores, *values]  # nothing says how likely a first token is
        return {
            "tokens": [self.model.words.name_of(token) for token in tokens],
            "token_logprobs": [score and score.value for score in scores],
            "top_logprobs": [
                score and self._name_alternatives(token, score) for token, score in zip(tokens, scores, strict=True)
            ],
            "text_offset": [begin + offset for offset in accumulate(map(len, pieces[:-1]), initial=0)][: len(pieces)],
        }

    def _name_alternatives(self, token: int, score: TokenScore) -> dict[str, float]:
        """The most likely tokens and the one that was taken, by their text; of two with one text, the likelier."""
        found: dict[str, float] = {}
        for other, value in [*score.alternatives, (token, score.value)]:
            found.setdefault(self.model.words.name_of(other), value)
        return found
