"""An indexed data set as a store of documents, so that it is packed like any tokenized text; nothing is copied."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma2_jax.config import DataConfig
from gemma2_jax.data.megatron.indexed import check_tokens, choose_part, open_indexed
from gemma2_jax.data.sources import Split
from gemma2_jax.data.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def open_indexed_store(
    data: DataConfig, split: Split, prefix: str, tokenizer: "PreTrainedTokenizerFast", cache: Path
) -> Store:
    """The documents of one split of PREFIX.bin, with the tokens that the file has, of which all are learned.

    Plans of their rows are kept in `cache`. Raises ValueError if the files are damaged or the split has no documents.
    """
    indexed = open_indexed(prefix)
    offsets = indexed.document_offsets()
    first, last = choose_part(data, split, prefix, len(offsets) - 1)
    begin, end = int(offsets[first]), int(offsets[last])
    offsets = offsets[first : last + 1] - begin
    digest = hashlib.blake2b(json.dumps([indexed.identity, begin, end]).encode(), digest_size=16).hexdigest()
    folder = cache / f"indexed-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    return Store(
        tokens=CheckedTokens(file=indexed.tokens[begin:end], vocabulary=vocabulary, prefix=prefix),
        learned=EveryToken(offsets=offsets),
        offsets=offsets,
        folder=folder,
    )


@dataclass(frozen=True, kw_only=True)
class CheckedTokens:
    """Slices of a file of tokens, int32. Raises ValueError for a token that the tokenizer does not have."""

    file: np.ndarray  # of any integer dtype [tokens]
    vocabulary: int
    prefix: str

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, part: slice) -> np.ndarray:
        return check_tokens(self.file[part], self.vocabulary, self.prefix)


@dataclass(frozen=True, kw_only=True)
class EveryToken:
    """Slices of what tells learned tokens, bool: all but the first of each document, which nothing predicts."""

    offsets: np.ndarray  # int64 [documents + 1]

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        learned = np.ones(max(stop - start, 0), np.bool_)
        low, high = np.searchsorted(self.offsets, [start, stop])
        learned[self.offsets[low:high] - start] = False
        return learned
