"""Rows of indexed data sets in the order in which Megatron-LM trains on them, sample for sample.

The rules are those of megatron/core/datasets: documents are shuffled over whole epochs and put end to end, each
sample takes up where the one before it ended, and the samples are shuffled; of several data sets, each sample is of
the one that is furthest behind its share. Which samples there are depends on how many the run asks for. The arrays are
made once, kept beside the tokenized data and memory-mapped.
"""

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from gemma2_jax.config import DataConfig
from gemma2_jax.data.cache import hold_lock
from gemma2_jax.data.megatron.indexed import Indexed, check_tokens, choose_part, find_prefix, open_indexed
from gemma2_jax.data.sources import Split, open_source

_FORMAT = 1  # to be raised when the code makes other arrays
_SEPARATE_EPOCH = 0.80  # of its samples: the last epoch is shuffled for itself where fewer are asked of it
_SURPLUS = 0.005  # more samples than its share that each of several data sets is made for
_LANES = 1024  # runs of samples that are blended side by side
_WARMUP = 512  # samples that a run is blended ahead of its first


@dataclass(frozen=True, kw_only=True)
class Order:
    """The samples of one data set. Sample i begins in document_index[sample_index[i, 0]], after sample_index[i, 1]."""

    document_index: np.ndarray  # int32 [epochs x documents]: sequences of the data set, in the order they are read
    sample_index: np.ndarray  # int32 or int64 [samples + 1, 2]: a place in document_index, and tokens of it to skip
    shuffle_index: np.ndarray  # uint32 or int64 [samples]: which sample comes when


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Which data set each row is of, and which of its samples it is."""

    dataset_index: np.ndarray  # int16 [rows]
    dataset_sample_index: np.ndarray  # int64 [rows]


@dataclass(frozen=True, kw_only=True)
class MegatronRows:
    """Rows of `length` tokens, by number: GPTDataset's samples, or BlendedDataset's where there is a blend."""

    datasets: tuple[Indexed, ...]
    orders: tuple[Order, ...]  # of each data set
    blend: Blend | None  # None: all rows are of the only data set
    length: int  # tokens in a row, T
    pad: int  # the token that Megatron takes for padding: its prediction does not count
    vocabulary: int  # tokens are smaller

    def __len__(self) -> int:
        return len(self.blend.dataset_index if self.blend else self.orders[0].shuffle_index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row's arrays, all [T]: tokens, targets, segments, positions (int32) and weights (float32).

        A row is one segment, and its positions count from 0: attention and targets cross from a document into the next.
        Raises ValueError for a token that the tokenizer does not have.
        """
        number, sample = 0, index
        if self.blend:
            number, sample = int(self.blend.dataset_index[index]), int(self.blend.dataset_sample_index[index])
        text = self._read_sample(number, int(self.orders[number].shuffle_index[sample]))
        text = check_tokens(text, self.vocabulary, self.datasets[number].prefix)
        text, is_padding = np.where(text == self.pad, 0, text), text == self.pad
        return {
            "tokens": text[:-1],
            "targets": text[1:],
            "segments": np.ones(self.length, np.int32),
            "positions": np.arange(self.length, dtype=np.int32),
            "weights": (~is_padding[1:]).astype(np.float32),
        }

    def _read_sample(self, number: int, sample: int) -> np.ndarray:
        """The tokens of a sample, and the first of the next one: [T + 1]."""
        dataset, order = self.datasets[number], self.orders[number]
        (first, start), (last, stop) = order.sample_index[sample : sample + 2].tolist()
        pieces = []
        for place in range(first, last + 1):
            sequence = order.document_index[place]
            begin, length = int(dataset.pointers[sequence]) // dataset.tokens.itemsize, int(dataset.lengths[sequence])
            end = begin + (stop + 1 if place == last else length)
            pieces.append(dataset.tokens[begin + (start if place == first else 0) : end])
        return np.concatenate(pieces)

    @property
    def tokens(self) -> int:
        """Tokens in the rows."""
        return len(self) * self.length

    @cached_property
    def identity(self) -> str:
        """A digest of the order of the rows, so that nobody goes on in the middle of another one."""
        digest = hashlib.blake2b(digest_size=8)
        for order in self.orders:  # whose last shuffle depends on the ones before it
            digest.update(np.ascontiguousarray(order.shuffle_index))
        return digest.hexdigest()

    @property
    def summary(self) -> str:
        """The rows in a line."""
        rows = f"{len(self):,} rows of {self.length:,} in Megatron's order, each one segment"
        if self.blend is None:
            return rows
        counts = np.bincount(self.blend.dataset_index, minlength=len(self.datasets)).tolist()
        pairs = zip(counts, self.datasets, strict=True)
        return f"{rows}: {', '.join(f'{count:,} of {dataset.prefix}' for count, dataset in pairs)}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a run asks of a source."""

    data: DataConfig
    split: Split
    rows: int  # that the run takes in all; the order depends on it
    length: int  # tokens in a row, T
    pad: int  # the token that Megatron takes for padding
    vocabulary: int
    cache: Path  # where the arrays are kept


def open_rows(request: Request) -> MegatronRows:
    """The rows of one split of `data.train`, or of `data.eval`, in Megatron's order.

    Of several data sets with weights, each is asked for its share of the rows and 0.5% more, as Megatron asks; without
    weights, each is read once. Raises ValueError if a source is no indexed data set, or has too few documents.
    """
    source = open_source(request.data, request.split)
    weights, datasets = _open_datasets(source)
    if len(datasets) == 1 and (weights is None or request.data.eval):
        return _make_rows(request, datasets, (_keep_order(request, datasets[0], request.rows),), None)
    if weights is None:
        orders = tuple(_keep_order(request, dataset, None) for dataset in datasets)
        counts = [len(order.shuffle_index) for order in orders]
        if sum(counts) < request.rows and request.split == "train":
            raise ValueError(
                f"{source} has {sum(counts):,} rows of {request.length:,} tokens, and the run takes {request.rows:,}; "
                f"give weights, by which data sets are read again, such as 0.5*{datasets[0].prefix},..."
            )
        rows, shares = min(sum(counts), request.rows), _normalize(counts)
    else:
        shares = _normalize(weights)
        counts = sample_counts(shares, request.rows, _SURPLUS)
        orders = tuple(_keep_order(request, *pair) for pair in zip(datasets, counts, strict=True))
        rows, shares = sum(sample_counts(shares, request.rows)), _normalize(shares)  # twice, to the last bit of a share
    kept = _keep_arrays(request.cache, ["blend", shares, rows], lambda: vars(build_blend(shares, rows)))
    return _make_rows(request, datasets, orders, Blend(**kept))


def _make_rows(
    request: Request, datasets: tuple[Indexed, ...], orders: tuple[Order, ...], blend: Blend | None
) -> MegatronRows:
    return MegatronRows(
        datasets=datasets,
        orders=orders,
        blend=blend,
        length=request.length,
        pad=request.pad,
        vocabulary=request.vocabulary,
    )


def _open_datasets(source: str) -> tuple[list[float] | None, tuple[Indexed, ...]]:
    """The data sets of a source such as a,b or 0.7*a,0.3*b, and their weights, if it gives any."""
    weights, datasets = [], []
    for part in source.split(","):
        weight, star, name = part.strip().rpartition("*")
        prefix = find_prefix(name)
        if prefix is None:
            raise ValueError(
                f"data.order megatron is one of indexed data sets, and there is no {name}.bin with {name}.idx; make "
                f"them of any source with python -m gemma2_jax.data build {name} PREFIX, or leave data.order out"
            )
        if star:
            weights.append(_read_weight(weight, source))
        datasets.append(open_indexed(prefix))
    if weights and len(weights) < len(datasets):
        raise ValueError(f"{source} gives weights to {len(weights)} of its {len(datasets)} data sets; give all or none")
    return weights or None, tuple(datasets)


def _read_weight(text: str, source: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"{text!r} in {source} is no weight; it must be a positive number, as in 0.7*a,0.3*b")
    return weight


def _normalize(weights: Sequence[float]) -> list[float]:
    """Weights that add up to 1, rounded as Megatron rounds them."""
    values = np.array(weights, np.float64)
    return (values / np.sum(values)).tolist()


def _keep_order(request: Request, dataset: Indexed, samples: int | None) -> Order:
    """The order of a data set's part of the split, from the cache if it is there."""
    bounds = choose_part(request.data, request.split, dataset.prefix, len(dataset.lengths))
    key = ["order", dataset.identity, bounds, samples, request.length, request.data.seed]

    def build() -> dict[str, np.ndarray]:
        return vars(build_order(dataset, bounds, samples=samples, length=request.length, seed=request.data.seed))

    return Order(**_keep_arrays(request.cache, key, build))


def _keep_arrays(cache: Path, key: list, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Memory maps of the arrays that `build` makes, which are kept in the cache under that key."""
    digest = hashlib.blake2b(json.dumps([_FORMAT, key]).encode(), digest_size=16).hexdigest()
    folder = cache / f"megatron-{digest}"
    if not folder.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with hold_lock(folder) as lock:
                if not folder.exists():  # another process may have made it meanwhile
                    _write_arrays(folder, lock.name_partial(folder), build())
        except OSError as error:
            raise OSError(
                f"the order of rows could not be written to {cache} ({error}); make room there, or name a folder on "
                "another disk with --data.cache"
            ) from error
    try:
        return {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"the order of rows in {folder} is damaged ({error}); delete it, and it is made again"
        ) from error


def _write_arrays(folder: Path, partial: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a folder of arrays, which gets its name when it is whole."""
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir()
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists():  # without locks, another process may have finished before
            raise


def sample_counts(weights: Sequence[float], rows: int, surplus: float = 0.0) -> list[int]:
    """Samples of each data set for so many rows of a blend, whose weights add up to 1; all are rounded up."""
    return [math.ceil(math.ceil(rows * weight) * (1 + surplus)) for weight in weights]


def build_order(dataset: Indexed, bounds: tuple[int, int], *, samples: int | None, length: int, seed: int) -> Order:
    """The order of the sequences from bounds[0] to bounds[1], for at least so many samples; None: of one epoch.

    Raises ValueError if they have too few tokens for one sample.
    """
    sizes = np.asarray(dataset.lengths)
    tokens = int(sizes[slice(*bounds)].sum(dtype=np.int64))
    if tokens <= (length if samples is None else 0):  # where samples are asked for, epochs are added for them
        raise ValueError(
            f"{dataset.prefix} has {tokens:,} tokens in its documents {bounds[0]:,} to {bounds[1]:,}, and a row takes "
            f"{length + 1:,}"
        )
    epochs = -(-(samples * length + 1) // tokens) if samples else 1
    earlier = ((epochs - 1) * tokens - 1) // length  # samples of all epochs but the last
    separate = (
        epochs > 1 and samples is not None and samples - earlier < int(_SEPARATE_EPOCH * ((tokens - 1) // length))
    )
    # The stream of RandomState never changes. Each shuffle goes on where the one before it ended.
    random = np.random.RandomState(seed)
    parts = [epochs - 1, 1] if separate else [epochs]
    documents = np.arange(*bounds, dtype=np.int32)
    document_index = np.concatenate([_shuffle(np.tile(documents, part), random) for part in parts])
    sample_index = _place_samples(sizes, document_index, (epochs * tokens - 1) // length, length)
    count = len(sample_index) - 1
    dtype = np.uint32 if count < np.iinfo(np.uint32).max - 1 else np.int64
    edges = [0, earlier, count] if separate else [0, count]
    shuffled = [_shuffle(np.arange(start, stop, dtype=dtype), random) for start, stop in itertools.pairwise(edges)]
    return Order(document_index=document_index, sample_index=sample_index, shuffle_index=np.concatenate(shuffled))


def _shuffle(values: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    random.shuffle(values)
    return values


def _place_samples(sizes: np.ndarray, document_index: np.ndarray, count: int, length: int) -> np.ndarray:
    """Where each of `count` samples begins, and where the last ends: [count + 1, 2]."""
    ends = np.cumsum(sizes[document_index], dtype=np.int64)
    largest = max(len(document_index), int(sizes.max()))
    index = np.zeros((count + 1, 2), np.int32 if largest <= np.iinfo(np.int32).max else np.int64)
    starts = np.arange(1, count + 1) * length  # the first begins at the first document, even if that is empty
    index[1:, 0] = places = np.searchsorted(ends, starts, side="right")
    index[1:, 1] = starts - (ends[places] - sizes[document_index[places]])
    return index


def build_blend(weights: Sequence[float], rows: int) -> Blend:
    """Gives each row to the data set that is furthest behind its share, which is its weight; of equals, to the first.

    A row depends on all before it, but a long run of rows ends alike from any counts near its shares. So `_LANES` runs
    are blended side by side, each from a guess some rows ahead of it; where a run does not begin as the one before it
    ended, it is blended again from there.
    """
    shares = np.array(weights, np.float64)
    lane_rows = -(-rows // _LANES)
    starts = np.arange(_LANES) * lane_rows
    lead = np.minimum(starts, _WARMUP)
    begins = _guess_counts(shares, starts - lead)
    for step in range(_WARMUP, 0, -1):
        lanes = np.flatnonzero(lead >= step)
        begins[lanes, _blend_row(shares, begins[lanes], starts[lanes] - step)] += 1
    index, ends = np.empty((lane_rows, _LANES), np.int16), np.empty_like(begins)
    lanes = np.arange(_LANES)
    while len(lanes):
        counts, every = begins[lanes], np.arange(len(lanes))
        for row in range(lane_rows):
            index[row, lanes] = chosen = _blend_row(shares, counts, starts[lanes] + row)
            counts[every, chosen] += 1
        ends[lanes] = counts
        lanes = 1 + np.flatnonzero((ends[:-1] != begins[1:]).any(axis=1))
        begins[lanes] = ends[lanes - 1]
    dataset_index = index.T.reshape(-1)[:rows]
    samples = np.empty(rows, np.int64)
    for number in range(len(weights)):
        chosen = np.flatnonzero(dataset_index == number)
        samples[chosen] = np.arange(len(chosen))
    return Blend(dataset_index=dataset_index, dataset_sample_index=samples)


def _guess_counts(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of each data set among the first so many, nearly: shares, rounded so that they add up. [lanes, datasets]."""
    shares = weights * rows[:, None]
    counts = np.floor(shares)
    missing = rows - counts.sum(axis=1)
    largest = np.argsort(np.argsort(counts - shares, axis=1, kind="stable"), axis=1)
    return counts + (largest < missing[:, None])


def _blend_row(weights: np.ndarray, counts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The data set of row number `rows`, after so many of each: [lanes] from [lanes, datasets] and [lanes]."""
    return np.argmax(weights * np.maximum(rows, 1.0)[:, None] - counts, axis=1)
