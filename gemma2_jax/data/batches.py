"""What a training loop reads from: one share of each batch as NumPy arrays, whose position is saved and restored.

A process reads the share that its devices take; processes whose devices differ only along axes other than data have one
in common. Global batch n holds the same rows into however many shares it is divided, each an equal part in their order,
so a run may go on with another number of them. `encoding` and `packing` say what a row is. Putting a batch on devices
is the loop's business.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grain
import numpy as np

from gemma2_jax.config import DataConfig
from gemma2_jax.data import encoding, packing, sources
from gemma2_jax.data.encoding import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Batches", "EvalBatches", "eval_batches", "load_tokenizer", "train_batches"]

Batch = dict[str, np.ndarray]  # see packing.Rows: each [B, T] with the rows of one share
_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # a row is a few copies; batches may be large


class Batches:
    """Training batches without end: the rows shuffled anew each epoch, every epoch following the last at once."""

    def __init__(self, rows: packing.Rows, *, batch_size: int, share_index: int, share_count: int, seed: int) -> None:
        share = _share(batch_size, share_count)
        self.rows = rows
        self.batch_size = batch_size
        # Batches of one share, of which each reader takes every share_count-th.
        shares = grain.MapDataset.source(rows).shuffle(seed).repeat().batch(share, drop_remainder=True)
        self._batches = iter(shares[share_index::share_count].to_iter_dataset(_AHEAD))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict:
        """The position after the last batch taken, for JSON; the same in every process."""
        return {"batches": self._batches.get_state(), "of": self._identity()}

    def set_state(self, state: dict) -> None:
        """Goes on where `get_state` was called; ValueError when these are not the same rows and batches."""
        if state["of"] != self._identity():
            raise ValueError(
                f"the saved position is in {state['of']}, but the data is now {self._identity()}; give back the "
                "data and the sizes of that run, or start a new run from its weights"
            )
        self._batches.set_state(state["batches"])

    def _identity(self) -> dict:
        rows = self.rows
        return {"rows": len(rows), "length": rows.length, "tokens": rows.tokens, "batch_size": self.batch_size}

    @property
    def summary(self) -> str:
        """The rows in a line, and how long an epoch is."""
        return f"{_summary(self.rows)}; an epoch is {len(self.rows) / self.batch_size:,.1f} steps"


@dataclass(frozen=True, kw_only=True)
class EvalBatches:
    """The batches of an evaluation, the same each time; rows that are missing in the last are padding."""

    rows: packing.Rows
    batch_size: int
    share_index: int
    share_count: int
    max_batches: int

    def __len__(self) -> int:
        return min(self.max_batches, -(-len(self.rows) // self.batch_size))

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        share = _share(self.batch_size, self.share_count)
        first = index * self.batch_size + self.share_index * share
        blank = packing.empty_batch(self.rows.length)
        rows = [self.rows[row] if row < len(self.rows) else blank for row in range(first, first + share)]
        return {name: np.stack([row[name] for row in rows]) for name in blank}

    @property
    def summary(self) -> str:
        """The rows in a line, and how many batches of them are read."""
        return f"{_summary(self.rows)}; {len(self)} batches are read"


def train_batches(
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    sequence_length: int,
    batch_size: int,
    cache: Path,
    share_index: int = 0,
    share_count: int = 1,
) -> Batches:
    """Batches of the training data, tokenised into `cache` first unless they are there.

    `batch_size` counts rows over all shares: each is of [batch_size / share_count, T] arrays. Raises ValueError
    when that does not divide, and for data that is missing, malformed or of no use.
    """
    _share(batch_size, share_count)  # before the long work
    rows = _rows(data, "train", tokenizer, sequence_length, cache, share_index)
    return Batches(rows, batch_size=batch_size, share_index=share_index, share_count=share_count, seed=data.seed)


def eval_batches(
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    sequence_length: int,
    batch_size: int,
    max_batches: int,
    cache: Path,
    share_index: int = 0,
    share_count: int = 1,
) -> EvalBatches:
    """The first `max_batches` batches of the held-out data; otherwise as `train_batches`."""
    _share(batch_size, share_count)
    return EvalBatches(
        rows=_rows(data, "eval", tokenizer, sequence_length, cache, share_index),
        batch_size=batch_size,
        share_index=share_index,
        share_count=share_count,
        max_batches=max_batches,
    )


def _share(batch_size: int, share_count: int) -> int:
    """Rows of a batch in each share."""
    if batch_size % share_count:
        raise ValueError(
            f"a batch of {batch_size} rows does not divide into {share_count} shares; "
            f"use {-(-batch_size // share_count) * share_count}"
        )
    return batch_size // share_count


def _rows(
    data: DataConfig,
    split: sources.Split,
    tokenizer: "PreTrainedTokenizerFast",
    length: int,
    cache: Path,
    share_index: int,
) -> packing.Rows:
    store = encoding.build_store(data, split, tokenizer, cache, show=share_index == 0)
    return packing.pack_documents(store, length=length, packing=data.packing, cut=data.kind == "text", seed=data.seed)


def _summary(rows: packing.Rows) -> str:
    full = rows.tokens / (len(rows) * rows.length)
    return (
        f"{rows.documents:,} documents ({rows.truncated:,} truncated, {rows.dropped:,} more dropped for length), "
        f"{rows.tokens:,} tokens ({rows.targets / rows.tokens:.0%} count in the loss), "
        f"{len(rows):,} rows of {rows.length:,} ({full:.1%} full)"
    )
