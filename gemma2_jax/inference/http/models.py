"""A model as the API names it: its tokenizer, its chat template, and what ends its texts."""

import re
import time
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.data.chat import ChatFormat, open_chat_format
from gemma2_jax.inference.defaults import stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What a name in a request stands for."""

    name: str
    tokenizer: "PreTrainedTokenizerFast"
    chat: ChatFormat
    text_stop: frozenset[int]  # tokens that end a text
    chat_stop: frozenset[int]  # tokens that end an answer
    created: int  # seconds since 1970
    adapter: str | None = None  # of those that the engine has, which its requests take

    @cached_property
    def words(self) -> "Words":
        return Words(self.tokenizer)


def describe_model(
    name: str, checkpoint: Checkpoint, tokenizer: "PreTrainedTokenizerFast", *, adapter: str | None = None
) -> ServedModel:
    """The model of a checkpoint under a name; `adapter` is what the engine calls one beside the weights."""
    return ServedModel(
        name=name,
        adapter=adapter,
        tokenizer=tokenizer,
        chat=open_chat_format(tokenizer, "refuse"),
        text_stop=frozenset(stop_tokens(checkpoint, tokenizer, chat=False)),
        chat_stop=frozenset(stop_tokens(checkpoint, tokenizer, chat=True)),
        created=int(time.time()),
    )


class Words:
    """The tokens of a vocabulary as text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for. A token may be a part of a character, of which others are the rest."""
        if token not in self._known:
            text = self._tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False)
            name = str(self._tokenizer.convert_ids_to_tokens(token) or "")
            self._known[token] = _read_bytes(name) if "\N{REPLACEMENT CHARACTER}" in text else text.encode()
        return self._known[token]

    def text_of(self, token: int) -> str:
        """A token as text; a part of a character is the replacement character."""
        return self.bytes_of(token).decode(errors="replace")

    def name_of(self, token: int) -> str:
        """A token as text; a part of a character is as in `bytes:\\xe2`, so that no two of them are alike."""
        try:
            return self.bytes_of(token).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes_of(token))


def _read_bytes(name: str) -> bytes:
    """The bytes of a token that is a part of a character: <0xE5> in Gemma's vocabulary, letters in a byte-level one."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", name):
        return bytes([int(name[3:5], 16)])
    letters = _byte_letters()
    return bytes(letters[letter] for letter in name) if set(name) <= set(letters) else name.encode()


@cache
def _byte_letters() -> dict[str, int]:
    """The letter that byte-level vocabularies have for each byte: Latin-1's, or one after these if it has none."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}
