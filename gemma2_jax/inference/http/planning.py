"""The engine's requests for a request of the API."""

import secrets
from collections.abc import Sequence

from gemma2_jax.data.chat import move_system
from gemma2_jax.data.records import Turn
from gemma2_jax.inference.engine import Request
from gemma2_jax.inference.http.errors import ApiError
from gemma2_jax.inference.http.models import ServedModel
from gemma2_jax.inference.http.schema import ChatBody, CompletionBody, Message, Settings
from gemma2_jax.inference.service import Choice
from gemma2_jax.inference.settings import Sampling
from gemma2_jax.inference.text import encode_prompt

_NEW_TOKENS = 16  # of a text, where no number is asked for: OpenAI's default; an answer may fill the context


def plan_completion(body: CompletionBody, model: ServedModel, context: int) -> list[Choice]:
    """The texts that POST /v1/completions asks for, `n` of each prompt. Raises ApiError and ValueError."""
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, f"best_of is {body.best_of}; it may only be n, {body.n or 1}", param="best_of")
    prompts = [
        prompt if isinstance(prompt, list) else encode_prompt(prompt, model.tokenizer, chat=False)
        for prompt in body.prompt
    ]
    new = _NEW_TOKENS if body.max_tokens is None else body.max_tokens
    if new == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0, which needs echo; ask for at least 1", param="max_tokens")
    echo = bool(body.echo) and (body.logprobs is not None or new == 0)
    return _plan_choices(body, model, prompts, new, context, model.text_stop, body.logprobs, echo=echo)


def plan_chat(body: ChatBody, model: ServedModel, context: int) -> list[Choice]:
    """The answers that POST /v1/chat/completions asks for. Raises ApiError and ValueError."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    prompt = encode_prompt(_write_messages(body.messages, model), model.tokenizer, chat=False)
    new = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    new = max(context - len(prompt), 1) if new is None else new
    if new == 0:
        raise ApiError(400, "max_tokens is 0; ask for at least 1", param="max_tokens")
    alternatives = (body.top_logprobs or 0) if body.logprobs else None
    return _plan_choices(body, model, [prompt], new, context, model.chat_stop, alternatives, echo=False)


def _write_messages(messages: Sequence[Message], model: ServedModel) -> str:
    """A conversation as the chat template writes it; system prompts are where training on them puts them."""
    if model.tokenizer.chat_template is None:
        raise ApiError(
            400, f"the tokenizer of {model.name} has no chat template; use /v1/completions", param="messages"
        )
    turns = [
        Turn(role="system" if message.role == "developer" else message.role, content=_read_content(message))
        for message in messages
    ]
    try:
        return model.chat.write(turns if model.chat.takes_system else move_system(turns), cue=True)
    except ValueError as error:
        raise ApiError(400, f"the chat template does not take these messages: {error}", param="messages") from error


def _read_content(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content)


def _plan_choices(
    body: Settings,
    model: ServedModel,
    prompts: Sequence[Sequence[int]],
    new: int,
    context: int,
    stop: frozenset[int],
    alternatives: int | None,
    *,
    echo: bool,
) -> list[Choice]:
    longest = max(map(len, prompts))
    if longest + new > context:
        raise ApiError(
            400,
            f"the prompt has {longest} tokens, with {new} new ones {longest + new}, and the context has {context}; "
            "shorten the prompt, or ask for fewer",
            param="messages" if isinstance(body, ChatBody) else "prompt",
            code="context_length_exceeded",
        )
    sampling = _read_sampling(body)
    ends = stop | frozenset(body.stop_token_ids or ())
    return [
        Choice(
            Request(
                prompt=prompt,
                max_new_tokens=new,
                sampling=sampling,
                sample=sample,
                stop=ends,
                alternatives=alternatives,
                echo=echo,
                adapter=model.adapter,
            ),
            model.tokenizer,
            body.stop,
        )
        for prompt in prompts
        for sample in range(body.n or 1)
    ]


def _read_sampling(body: Settings) -> Sampling:
    """How tokens are chosen: OpenAI's defaults, and a seed of chance where none is given."""
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k if body.top_k and body.top_k > 0 else None,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias,
        seed=secrets.randbits(31) if body.seed is None else body.seed % 2**31,
    )
