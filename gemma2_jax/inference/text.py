"""Tokens of prompts, and text of tokens as they come. The tokenizer is given; nothing here computes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encode_prompt(prompt: str, tokenizer: "PreTrainedTokenizerFast", *, chat: bool) -> list[int]:
    """A prompt's tokens from <bos> on; with `chat` as a user's turn, with the model's turn opened after it.

    Raises ValueError for `chat` where the tokenizer has no chat template.
    """
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; leave out --chat")
        turn = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    tokens = tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
    bos = tokenizer.bos_token_id
    assert isinstance(bos, int)  # load_tokenizer made sure
    return tokens if tokens[:1] == [bos] else [bos, *tokens]


def decode_text(tokens: list[int], tokenizer: "PreTrainedTokenizerFast") -> str:
    """The text of tokens, without special ones."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


class TextStream:
    """The text of tokens that come a few at a time."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0  # characters that were given out

    @property
    def whole(self) -> str:
        """The text so far."""
        return decode_text(self._tokens, self._tokenizer)

    def add(self, tokens: list[int]) -> str:
        """The text that these tokens complete. A character may wait for tokens yet to come."""
        self._tokens += tokens
        return self._take(self.whole.rstrip("\ufffd"))

    def flush(self) -> str:
        """The text that is left to show when no more tokens come."""
        return self._take(self.whole)

    def _take(self, text: str) -> str:
        new = text[self._shown :]
        self._shown += len(new)
        return new
