"""What a training loop reads from: one share of each batch as NumPy arrays, whose position is saved and restored.

A process reads the share that its devices take; processes whose devices differ only along axes other than data read the
same share. Global batch n holds the same rows in the same order for any number of shares, and each share is an equal
run of them, so a run may resume with another number of shares. `encoding` and `packing` say what a row is. The loop
puts batches on devices.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grain
import numpy as np

from gemma2_jax.config import DataConfig
from gemma2_jax.data import inspection, mixtures, packing, sources
from gemma2_jax.data.encoding import load_tokenizer
from gemma2_jax.data.megatron import order as megatron_order
from gemma2_jax.data.megatron.indexed import find_prefix
from gemma2_jax.data.megatron.indexed_store import open_indexed_store
from gemma2_jax.data.megatron.order import MegatronRows
from gemma2_jax.data.mixtures import MixedRows
from gemma2_jax.data.reading.places import identify
from gemma2_jax.data.store import Store, build_store
from gemma2_jax.data.streaming import Stream, StreamBatches, open_stream
from gemma2_jax.data.wording import describe_count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Batches", "EvalBatches", "Layout", "eval_batches", "load_tokenizer", "train_batches"]

AnyRows = packing.Rows | MixedRows | MegatronRows
Batch = dict[str, np.ndarray]  # see packing.Rows: each [B, T] with the rows of one share; MixedRows has sources, [B]
_EXAMPLES = 1 << 20  # documents of a plan of which one is shown, at most
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # rows are cheap to make, batches may be large


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes of a batch, and the share of it that is read here. Raises ValueError if shares would be unequal."""

    sequence_length: int  # tokens in a row, T
    batch_size: int  # rows of a batch, over all shares
    share_index: int = 0
    share_count: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.share_count:
            raise ValueError(
                f"a batch of {self.batch_size} rows does not divide into {self.share_count} shares; "
                f"use {-(-self.batch_size // self.share_count) * self.share_count}"
            )

    @property
    def share_rows(self) -> int:
        """Rows of a batch in each share, B."""
        return self.batch_size // self.share_count

    @property
    def share(self) -> slice:
        """The rows of a batch that are read here."""
        return slice(self.share_index * self.share_rows, (self.share_index + 1) * self.share_rows)


class Batches:
    """An endless iterator of training batches: epochs follow each other without a gap, each in another order.

    Of several sources with weights, each goes through epochs of its own. Rows in Megatron's order are as many as the
    run takes, and are taken once, as they come. A stream has its documents in the order of its source in every epoch.
    """

    def __init__(self, rows: AnyRows | Stream, layout: Layout, *, seed: int) -> None:
        self.rows = rows
        self.layout = layout
        self._shares: grain.MapDataset | None = None  # a stream cannot go back
        if isinstance(rows, Stream):
            show = layout.share_index == 0
            self._batches = StreamBatches(rows, batch_size=layout.batch_size, share=layout.share, show=show)
            return
        if isinstance(rows, MixedRows):
            dataset = rows.shuffle(seed)
        else:
            dataset = grain.MapDataset.source(rows)
            if isinstance(rows, packing.Rows):
                dataset = dataset.shuffle(seed).repeat()
        # All shares of all batches in order; each reader takes every share_count-th of them.
        self._shares = dataset.batch(layout.share_rows, drop_remainder=True)
        self._batches = iter(self._shares[layout.share_index :: layout.share_count].to_iter_dataset(_READ_OPTIONS))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def read_shares(self, number: int) -> list[Batch]:
        """All shares of the batch of that number, counted from 0, whichever are read here; none of a stream's.

        The position stays.
        """
        if self._shares is None:
            return []
        first = number * self.layout.share_count
        return list(self._shares[first : first + self.layout.share_count])

    def get_state(self) -> dict:
        """The position after the last batch taken, for JSON; the same in every process."""
        return {"batches": self._batches.get_state(), "of": self._identity()}

    def set_state(self, state: dict) -> None:
        """Goes on where `get_state` was called; ValueError if these are not the same rows and batches."""
        if state["of"] != self._identity():
            raise ValueError(
                f"its position is one in {_describe_identity(state['of'])}, and the data is now "
                f"{_describe_identity(self._identity())}"
            )
        self._batches.set_state(state["batches"])

    def _identity(self) -> dict:
        rows, batch_size = self.rows, self.layout.batch_size
        if isinstance(rows, Stream):  # whose position has a digest of all rows taken
            return {"stream": rows.data.train, "length": rows.length, "batch_size": batch_size}
        if isinstance(rows, MegatronRows):  # of more rows of the same order, the first are the same
            return {"order": rows.identity, "length": rows.length, "batch_size": batch_size}
        if isinstance(rows, MixedRows):
            weights = [str(source.weight or "") for source in rows.sources]
            return {"sources": [*map(_identify_rows, rows.parts)], "weights": weights, "batch_size": batch_size}
        return {**_identify_rows(rows), "batch_size": batch_size}

    @property
    def stores(self) -> list[Store]:
        """The tokenized documents of each source; of Megatron's order none, of a stream its first."""
        return [self.rows.first_document] if isinstance(self.rows, Stream) else _list_stores(self.rows)

    def describe_example(self, tokenizer: "PreTrainedTokenizerFast") -> str:
        """A document that is trained on, in a line, as rows cut it; of Megatron's order, the empty string."""
        if isinstance(self.rows, MegatronRows):
            return ""
        if isinstance(self.rows, Stream):
            most = sys.maxsize if self.rows.cuts_documents else self.rows.length
            return inspection.describe_example(self.rows.first_document, tokenizer, most=most)
        rows = self.rows.parts[0] if isinstance(self.rows, MixedRows) else self.rows
        number = int(rows.plan.order[:_EXAMPLES].min())
        most = sys.maxsize if rows.plan.kind == "cut" else rows.length
        return inspection.describe_example(rows.store, tokenizer, number, most)

    @property
    def summary(self) -> str:
        """The rows in a line, and how long an epoch is."""
        if isinstance(self.rows, Stream):
            return self.rows.summary
        steps = f"{len(self.rows) / self.layout.batch_size:,.1f} steps"
        if isinstance(self.rows, MegatronRows):
            return f"{self.rows.summary}; {steps}"
        if isinstance(self.rows, MixedRows) and self.rows.weights:
            return f"{len(self.rows.sources)} sources by weight; each has epochs of its own"
        return f"{_describe_rows(self.rows)}; an epoch is {steps}"

    def count_epochs(self, steps: int) -> dict[str, float]:
        """How often so many steps go through each of several sources, by its name; empty where there is one."""
        return self.rows.count_epochs(steps * self.layout.batch_size) if isinstance(self.rows, MixedRows) else {}

    def describe_sources(self, steps: int) -> dict[str, str]:
        """Each of several sources in a line, by its name: what it gives to a run of so many steps."""
        if not isinstance(self.rows, MixedRows):
            return {}
        epochs, shares, run = self.count_epochs(steps), self.rows.shares, describe_count(steps, "step")
        return {
            source.name: f"{share:.3g} of the rows, {epochs[source.name]:,.3g} epochs in {run}; {_describe_rows(part)}"
            for source, part, share in zip(self.rows.sources, self.rows.parts, shares, strict=True)
        }


@dataclass(frozen=True, kw_only=True)
class EvalBatches:
    """The batches of an evaluation, the same each time; the last is filled up with padding."""

    rows: AnyRows
    layout: Layout
    max_batches: int
    origin: str = ""  # what the rows are of, where their number does not tell

    @property
    def stores(self) -> list[Store]:
        """The tokenized documents of each source; of Megatron's order none."""
        return _list_stores(self.rows)

    def __len__(self) -> int:
        return min(self.max_batches, -(-len(self.rows) // self.layout.batch_size))

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        share, first = self.layout.share, index * self.layout.batch_size
        padding = packing.empty_batch(self.rows.length)
        if isinstance(self.rows, MixedRows):
            padding["sources"] = np.array(0, np.int32)
        rows = [
            self.rows[row] if row < len(self.rows) else padding
            for row in range(first + share.start, first + share.stop)
        ]
        return {name: np.stack([row[name] for row in rows]) for name in padding}

    @property
    def summary(self) -> str:
        """The rows in a line, and how many batches of them are read."""
        rows = self.rows.summary if isinstance(self.rows, MegatronRows) else _describe_rows(self.rows)
        return f"{self.origin}{rows}; {describe_count(len(self), 'batch', 'batches')} of them evaluated"


def train_batches(
    data: DataConfig, tokenizer: "PreTrainedTokenizerFast", layout: Layout, *, cache: Path, steps: int = 1
) -> Batches:
    """Batches of the training data, whose tokens are kept in `cache`: arrays [B, T] with the rows of one share.

    `steps` is how many of them the run takes, on which Megatron's order depends, and no other. Raises ValueError if
    data is missing or malformed, or if no document of it can be trained on.
    """
    if data.stream:
        return Batches(open_stream(data, tokenizer, layout.sequence_length), layout, seed=data.seed)
    if data.order == "megatron":
        return Batches(_order_rows(data, "train", tokenizer, layout, cache, steps), layout, seed=data.seed)
    return Batches(_open_rows(data, "train", tokenizer, layout, cache), layout, seed=data.seed)


def eval_batches(
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerFast",
    layout: Layout,
    *,
    cache: Path,
    max_batches: int,
    evaluations: int = 1,
) -> EvalBatches:
    """The first `max_batches` batches of the held-out data; otherwise as `train_batches`.

    Megatron's order depends on how many evaluations there are, as Megatron reads on in each.
    """
    if data.stream and sources.is_share_held_out(data):
        stream = Stream(data=data, tokenizer=tokenizer, length=layout.sequence_length)
        store = stream.read_held_out(max_batches * layout.batch_size * layout.sequence_length)
        rows: AnyRows = _pack_store(store, data, "eval", layout)
        return EvalBatches(rows=rows, layout=layout, max_batches=max_batches, origin=stream.held_out_origin)
    if data.order == "megatron":
        rows = _order_rows(data, "eval", tokenizer, layout, cache, evaluations * max_batches)
    else:
        rows = _open_rows(data, "eval", tokenizer, layout, cache)
    return EvalBatches(rows=rows, layout=layout, max_batches=max_batches)


def find_shared(data: DataConfig) -> list[str]:
    """What is both trained on and held out: files that `data.train` and `data.eval` have in common, in order."""
    if not data.eval:
        return []
    train, held_out = ({*_list_contents(data, split)} for split in sources.SPLITS)
    return sorted(train & held_out)


def describe_repeated(data: DataConfig) -> str:
    """A sentence on files that several sources of `data.train` have, which are trained on for each; "" of none."""
    names: dict[str, list[str]] = {}  # of sources, as they are given, by the file
    given = mixtures.list_sources(data, "train")
    for source in given if len(given) > 1 else ():
        for content in {*_list_source(source, "train")}:
            names.setdefault(content, []).append(source.data.train)
    repeated = sorted(content for content, having in names.items() if len(having) > 1)
    if not repeated:
        return ""
    count = f"{len(repeated):,} files, such as {repeated[0]}" if len(repeated) > 1 else repeated[0]
    what = "they are" if len(repeated) > 1 else "it is"
    return f"several sources ({', '.join(names[repeated[0]])}) have {count}; {what} trained on in each of them"


def _list_contents(data: DataConfig, split: sources.Split) -> Iterator[str]:
    for source in mixtures.list_sources(data, split):
        yield from _list_source(source, split)


def _list_source(source: mixtures.Source, split: sources.Split) -> Iterator[str]:
    place = sources.open_source(source.data, split)
    if prefix := find_prefix(place):
        yield str(Path(f"{prefix}.bin").resolve())
    elif place == sources.PYTHON_DOCS:
        yield place
    else:
        yield from map(identify, sources.choose_places(source.data, split).places)


def _list_stores(rows: AnyRows) -> list[Store]:
    if isinstance(rows, MegatronRows):
        return []
    return [part.store for part in (rows.parts if isinstance(rows, MixedRows) else (rows,))]


def _order_rows(
    data: DataConfig,
    split: sources.Split,
    tokenizer: "PreTrainedTokenizerFast",
    layout: Layout,
    cache: Path,
    batches: int,
) -> MegatronRows:
    pad = tokenizer.pad_token_id
    request = megatron_order.Request(
        data=data,
        split=split,
        rows=batches * layout.batch_size,
        length=layout.sequence_length,
        pad=pad if isinstance(pad, int) else -1,  # as Megatron has it where the tokenizer has none
        vocabulary=max(tokenizer.get_vocab().values()) + 1,
        cache=cache,
    )
    return megatron_order.open_rows(request)


def _open_rows(
    data: DataConfig, split: sources.Split, tokenizer: "PreTrainedTokenizerFast", layout: Layout, cache: Path
) -> packing.Rows | MixedRows:
    """The rows of one source, or of several; held-out ones are spread so that the first are of all sources."""
    given = mixtures.list_sources(data, split)
    parts = tuple(_pack_rows(source.data, split, tokenizer, layout, cache) for source in given)
    return parts[0] if len(parts) == 1 else MixedRows(sources=given, parts=parts, spread=split == "eval")


def _pack_rows(
    data: DataConfig, split: sources.Split, tokenizer: "PreTrainedTokenizerFast", layout: Layout, cache: Path
) -> packing.Rows:
    source = sources.open_source(data, split)
    if prefix := find_prefix(source):
        store = open_indexed_store(data, split, prefix, tokenizer, cache)
    elif data.split_shares:
        raise ValueError(
            f"data.split_shares {data.split_shares} divides .bin and .idx files, and {source} is none; "
            "--data.eval_fraction holds out a share of it"
        )
    else:
        store = build_store(data, split, tokenizer, cache, show=layout.share_index == 0)
    return _pack_store(store, data, split, layout)


def _pack_store(store: Store, data: DataConfig, split: sources.Split, layout: Layout) -> packing.Rows:
    try:
        return packing.pack_documents(
            store,
            length=layout.sequence_length,
            packing=data.packing,
            concatenate=data.kind == "text",
            seed=data.seed,
        )
    except ValueError as error:
        purpose = "training" if split == "train" else "held-out"
        raise ValueError(f"no {purpose} document of {sources.open_source(data, split)} is of use: {error}") from error


def _describe_rows(rows: packing.Rows | MixedRows) -> str:
    plans = [part.plan for part in rows.parts] if isinstance(rows, MixedRows) else [rows.plan]
    documents, truncated, dropped, tokens, targets = (
        sum(getattr(plan, name) for plan in plans)
        for name in ("documents", "truncated", "dropped", "tokens", "targets")
    )
    return (
        f"{describe_count(documents, 'document')} ({truncated:,} truncated, {dropped:,} more dropped for length), "
        f"{tokens:,} tokens ({targets / tokens:.0%} count in the loss), {describe_count(len(rows), 'row')} of "
        f"{rows.length:,} ({tokens / (len(rows) * rows.length):.1%} full)"
    )


def _identify_rows(rows: packing.Rows) -> dict:
    identity = {"rows": len(rows), "length": rows.length, "tokens": rows.plan.tokens}
    # Version 0.1 packed whole documents in another order. It named none, and had the same order otherwise.
    return identity | ({"packing": "by length"} if rows.plan.kind == "whole" else {})


def _describe_identity(identity: dict) -> str:
    """In words, what `Batches.get_state` keeps to recognize its rows."""
    if "stream" in identity:
        rows = f"rows of {identity['length']:,} in a stream of {identity['stream']}"
    elif "order" in identity:
        rows = f"rows of {identity['length']:,} in Megatron's order {identity['order']} (which depends on steps)"
    elif "sources" in identity:
        pairs = zip(identity["sources"], identity["weights"], strict=True)
        parts = [f"{_describe_part(part)}{f' with weight {weight}' if weight else ''}" for part, weight in pairs]
        rows = f"a mixture of {' and '.join(parts)}"
    else:
        rows = _describe_part(identity)
    return f"{rows}, {identity['batch_size']:,} to a batch"


def _describe_part(identity: dict) -> str:
    packed = f", packed {identity['packing']}" if "packing" in identity else ""
    rows = f"{describe_count(identity['rows'], 'row')} of {identity['length']:,}"
    return f"{rows} with {identity['tokens']:,} tokens{packed}"
