"""A source of text written as Megatron's .bin and .idx, tokenized by all CPUs."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma2_jax.config import DataConfig
from gemma2_jax.data.cache import hold_lock
from gemma2_jax.data.megatron.indexed import (
    Indexed,
    IndexedWriter,
    check_target,
    find_prefix,
    open_indexed,
    smallest_dtype,
    take_back,
)
from gemma2_jax.data.store import DISK_ERRORS, Store, build_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CHUNK = 1 << 22  # tokens that are written at one time


def build_indexed(
    data: DataConfig, prefix: str, tokenizer: "PreTrainedTokenizerFast", *, bos: bool, workers: int | None
) -> Indexed:
    """Writes all documents of `data.train` to PREFIX.bin and PREFIX.idx: <bos>, the text and <eos> of each.

    Without `bos`, its token is left out, as Megatron-LM's own tool does. Until both files are whole they are in
    PREFIX.partial, from which a build that was killed goes on. Raises ValueError if the files exist, or if a document
    cannot be read, and OSError if the disk is full.
    """
    if find_prefix(data.train):
        raise ValueError(f"{data.train} is tokenized already; train on it with --data.train {shlex.quote(data.train)}")
    if data.kind != "text":
        raise ValueError(
            f"data.kind is {data.kind}, and a .bin file cannot say which tokens answer a prompt; --data.kind text "
            "writes texts, all of whose tokens are learned"
        )
    folder = Path(f"{prefix}.partial")
    if not folder.exists():
        check_target(prefix)
    with hold_lock(folder / "build"):
        take_back(prefix, folder)
        try:
            check_target(prefix)
        except ValueError:  # another process has made it meanwhile
            if os.listdir(folder) == ["build.lock"]:
                shutil.rmtree(folder)
            raise
        try:
            _build(data, prefix, folder, tokenizer, bos=bos, workers=workers)
        except ValueError:  # after what remedies it, other documents are tokenized
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except OSError as error:
            reason = error.__cause__ or error  # `build_store` says how to mend a cache, which this folder is not
            if reason is error and error.errno not in DISK_ERRORS:
                raise  # of the source
            raise OSError(
                f"{prefix}.bin and .idx could not be written ({reason}); once that is mended the same command goes on "
                f"from what is kept in {folder}, or write elsewhere"
            ) from error
        shutil.rmtree(folder)
    return open_indexed(prefix)


def _build(
    data: DataConfig,
    prefix: str,
    folder: Path,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    bos: bool,
    workers: int | None,
) -> None:
    everything = replace(data, eval="", eval_fraction=0.0)
    store = build_store(everything, "train", tokenizer, folder, show=True, workers=workers)
    for sentence in store.report.describe():
        print(sentence, file=sys.stderr)
    entries = max(tokenizer.get_vocab().values()) + 1
    with IndexedWriter(prefix, smallest_dtype(entries), folder) as writer:
        for tokens, lengths in _read_documents(store):
            if not bos:
                tokens, lengths = _remove_first(tokens, lengths)
            writer.write(tokens, lengths)


def _read_documents(store: Store) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens of so many documents that they are about a chunk, and the length of each; until there are no more."""
    first, documents = 0, len(store.offsets) - 1
    while first < documents:
        last = int(np.searchsorted(store.offsets, store.offsets[first] + _CHUNK, side="right")) - 1
        last = min(max(last, first + 1), documents)
        offsets = np.asarray(store.offsets[first : last + 1])
        yield store.tokens[int(offsets[0]) : int(offsets[-1])], np.diff(offsets)
        first = last


def _remove_first(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Documents without their first token, which is <bos>."""
    return np.delete(tokens, np.cumsum(lengths) - lengths), lengths - 1
