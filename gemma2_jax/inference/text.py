"""Encodes prompts, and decodes tokens as they arrive, with a tokenizer that the caller gives."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

from gemma2_jax.data.chat import ChatFormat, move_system, write_messages
from gemma2_jax.data.records import Turn
from gemma2_jax.data.wording import quote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encode_prompt(prompt: str, tokenizer: "PreTrainedTokenizerFast", *, chat: bool) -> list[int]:
    """A prompt's tokens, beginning with <bos>; with `chat`, as a user's turn followed by the start of the model's.

    Raises ValueError if `chat` is asked for and the tokenizer has no chat template, or one that does not take the
    prompt, and for a prompt that is not text.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt is {prompt!r}; give a string")
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; leave out --chat")
        turn = [{"role": "user", "content": prompt}]
        try:
            prompt = write_messages(turn, tokenizer, cue=True)
        except ValueError as error:
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path} does not take the prompt: {error}; mend the template, "
                "or leave out --chat"
            ) from error
    return _encode_text(prompt, tokenizer)


def encode_turns(turns: Sequence[Turn], chat: ChatFormat) -> list[int]:
    """The tokens of a conversation, beginning with <bos>, and of the start of the model's turn.

    A system prompt that the template has no place for is put before the user's next turn, as in training. Raises
    ValueError where the template does not take the conversation, or there is none.
    """
    tokenizer = chat.tokenizer
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; use the checkpoint of a model that "
            "answers, such as google/gemma-2-2b-it"
        )
    try:
        text = chat.write(turns if chat.takes_system else move_system(turns), cue=True)
    except ValueError as error:
        raise ValueError(f"the chat template does not take these messages: {error}") from error
    return _encode_text(text, tokenizer)


def _encode_text(text: str, tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Python's way to keep the bytes of an argument that are not UTF-8
        raise ValueError(
            f"the prompt {quote(text)} has bytes that are not UTF-8, or half of a character; give it as UTF-8 text"
        ) from error
    tokens = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    bos = tokenizer.bos_token_id
    assert isinstance(bos, int)  # load_tokenizer made sure
    return tokens if tokens[:1] == [bos] else [bos, *tokens]


def decode_text(tokens: list[int], tokenizer: "PreTrainedTokenizerFast") -> str:
    """The text of tokens, without special ones."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


class TextStream:
    """The text of tokens that arrive one at a time. A character whose last token is missing is held back."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self.text = ""  # so far

    def add(self, token: int) -> str:
        """The new text that this token completes."""
        self._tokens.append(token)
        new = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        self.text += new
        return new

    def flush(self) -> str:
        """The text that was held back, once no more tokens arrive."""
        new = decode_text(self._tokens, self._tokenizer)[len(self.text) :]
        self.text += new
        return new
