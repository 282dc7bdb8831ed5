"""Several sources in one run: what they are called, how much of the rows each gives, and which row is whose.

With weights, such as 0.7*chat.jsonl,0.3*code/, each source is shuffled and repeated by itself, and after any number of
rows has given its share of them, to within one row. Without, an epoch has every row of all of them once. Blends of
Megatron's order have rules of their own (`megatron.order`).
"""

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from pathlib import PurePosixPath

import grain
import numpy as np

from gemma2_jax.config import DataConfig
from gemma2_jax.data import sources
from gemma2_jax.data.packing import Rows
from gemma2_jax.data.reading.files import has_match

LONGEST_PERIOD = 100_000  # rows after which a schedule begins anew, at most: it is made in a loop over them
_COLON_WEIGHT = re.compile(r"(\d*\.\d+|\d+):(?!//)([^,]+)")  # as other programs have weights
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_WEIGHT = re.compile(rf"({_NUMBER})\s*\*(.*)")
_NO_WEIGHT = re.compile(  # signs, exponents, fractions, shares of 100, and what is no number
    rf"([+-]?(?:nan|inf|infinity|{_NUMBER}(?:\s*/\s*{_NUMBER}|e[+-]?\d+|\s*%)?))\s*\*(.+)", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of the sources that a split is read from."""

    name: str  # short, and no other's
    weight: Fraction | None  # None: in proportion to its rows
    data: DataConfig  # as of a run that has no other source


def list_sources(data: DataConfig, split: sources.Split) -> tuple[Source, ...]:
    """The sources of a split: those of data.eval, or of data.train; one where none are separated by commas.

    Raises ValueError for weights that are no positive numbers, that not all have, or that repeat after too many rows,
    and for a source given twice.
    """
    field = "eval" if split == "eval" and data.eval else "train"
    text = sources.open_source(data, split)
    if (match := _COLON_WEIGHT.match(text)) and not os.path.exists(text):
        raise ValueError(f"data.{field} is {text!r}; weights are written with *, as in {match[1]}*{match[2]}")
    if "," not in text or data.order == "megatron" or os.path.exists(text) or has_match(text):
        return (Source(name=text, weight=None, data=data),)
    pairs = [_split_weight(part.strip(), f"data.{field}") for part in text.split(",")]
    weights, places = [weight for weight, _ in pairs], [place for _, place in pairs]
    _check_sources(f"data.{field}", weights, places)
    given = [weight for weight in weights if weight is not None]
    if given and split == "train":
        whole_shares(given)  # refuses what cannot be scheduled
    return tuple(
        Source(name=name, weight=weight, data=replace(data, **{field: place}))
        for name, weight, place in zip(name_places(places), weights, places, strict=True)
    )


def _split_weight(text: str, field: str) -> tuple[Fraction | None, str]:
    """A source's weight, and its place. Raises ValueError for what looks like a weight, and is none."""
    if match := _WEIGHT.fullmatch(text):
        return Fraction(match[1]), match[2].strip()
    if (match := _NO_WEIGHT.fullmatch(text)) and not has_match(text):
        hint = "; fractions are written as whole numbers in their proportion, as 1*a,2*b" if "/" in match[1] else ""
        raise ValueError(
            f"{field} has {text!r}, and {match[1]} is not a weight; a weight is digits with or without a point, and "
            f"above 0, as in 0.5*{match[2].strip()}{hint}"
        )
    return None, text


def _check_sources(field: str, weights: Sequence[Fraction | None], places: Sequence[str]) -> None:
    if not all(places):
        raise ValueError(f"{field} names no source before or after one of its commas; give it, or remove the comma")
    twice = [place for place, count in Counter(places).items() if count > 1]
    if twice:
        raise ValueError(f"{field} names {twice[0]} twice; name it once, with a larger weight for more of it")
    bare = [place for place, weight in zip(places, weights, strict=True) if weight is None]
    if bare and len(bare) < len(places):
        raise ValueError(f"{field} gives no weight to {bare[0]}, and one to others; give all sources one, or none")
    if field == "data.eval" and not bare:
        raise ValueError("data.eval gives weights, and held-out data is read once; leave them out")
    for place, weight in zip(places, weights, strict=True):
        if weight == 0:
            raise ValueError(f"{field} gives {place} the weight 0; give a positive one, or leave the source out")


def name_places(places: Sequence[str]) -> list[str]:
    """Short names of sources, each of them another: chat of data/chat.jsonl, code of code/, web of web/*.parquet.

    Of those that end alike, the folders before tell them apart, and where these do not, numbers.
    """
    paths = [_plain_parts(place) for place in places]
    depths = [1] * len(paths)
    while True:
        names = ["/".join(path[-depth:]) for path, depth in zip(paths, depths, strict=True)]
        counts = Counter(names)
        longer = [
            counts[name] > 1 and depth < len(path) for name, path, depth in zip(names, paths, depths, strict=True)
        ]
        if not any(longer):
            break
        depths = [depth + more for depth, more in zip(depths, longer, strict=True)]
    return [
        name if counts[name] == 1 else f"{name}-{names[: number + 1].count(name)}" for number, name in enumerate(names)
    ]


def _plain_parts(place: str) -> list[str]:
    """The parts of a path or URL, without globs and the endings of a file's name."""
    parts = PurePosixPath(place.split("://")[-1].split("?")[0] if "://" in place else place).parts
    parts = [re.split(r"[*?\[]", part)[0].strip(" ._-/") for part in parts]
    parts = [part for part in parts if part] or ["data"]
    return [*parts[:-1], parts[-1].split(".")[0] or parts[-1]]


def whole_shares(weights: Sequence[Fraction]) -> list[int]:
    """The smallest whole numbers in proportion to the weights. Raises ValueError where their sum is too large."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    shares = [int(weight * scale) for weight in weights]
    shares = [share // math.gcd(*shares) for share in shares]
    if sum(shares) > LONGEST_PERIOD:
        raise ValueError(
            f"rows in the proportion {':'.join(map(str, shares))} would come in turns of {sum(shares):,}, and at most "
            f"{LONGEST_PERIOD:,} are possible; round the weights of data.train"
        )
    return shares


class Schedule(grain.transforms.DatasetSelectionMap):
    """Which source each row of a mixture is of, and which of that source's rows, from the row's number alone.

    Row n is due from the source whose next row must come soonest, of those that may give one: a source with the share
    w gives its row k not before row floor(k / w), and not after row ceil((k + 1) / w) - 1. Such a schedule exists, and
    to take the earliest deadline finds it, as the shares add up to 1 (Liu and Layland 1973; Baruah et al. 1996,
    "Proportionate progress"). So after n rows a source has given w n rows, rounded down or up. The row that is furthest
    behind would not do: of many sources, some would be more than a row behind. Grain's own mix rounds weights.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        self.shares = whole_shares(weights)
        self.period = sum(self.shares)
        turn = np.empty(self.period, np.int32)
        given = [0] * len(self.shares)
        for row in range(self.period):
            deadlines = [
                (-(-(count + 1) * self.period // share), number)
                for number, (count, share) in enumerate(zip(given, self.shares, strict=True))
                if count * self.period < (row + 1) * share
            ]
            turn[row] = chosen = min(deadlines)[1]
            given[chosen] += 1
        self._turn = turn
        # [period + 1, sources]: rows that each source has given before each row of a period
        self._given = np.zeros((self.period + 1, len(self.shares)), np.int32)
        np.cumsum(turn[:, None] == np.arange(len(self.shares)), axis=0, out=self._given[1:])

    def __len__(self) -> int:
        return np.iinfo(np.int64).max

    def __getitem__(self, row: int) -> tuple[int, int]:
        periods, place = divmod(row, self.period)
        source = int(self._turn[place])
        return source, periods * self.shares[source] + int(self._given[place, source])

    def count_rows(self, rows: int) -> list[int]:
        """How many of the first rows each source gives."""
        periods, place = divmod(rows, self.period)
        return [periods * share + int(count) for share, count in zip(self.shares, self._given[place], strict=True)]


@dataclass(frozen=True, kw_only=True)
class MixedRows:
    """Rows of several sources, one source after the other, or spread evenly over each other.

    A row has one more array than those of `packing.Rows`: sources, int32 [], the number of its source.
    """

    sources: tuple[Source, ...]
    parts: tuple[Rows, ...]  # of each source
    spread: bool = False  # so that any number of the first rows has each source's share

    @property
    def length(self) -> int:
        """Tokens in a row, T."""
        return self.parts[0].length

    @property
    def weights(self) -> list[Fraction]:
        """Those given; empty if none were."""
        return [source.weight for source in self.sources if source.weight is not None]

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate(map(len, self.parts), initial=0))

    @cached_property
    def _order(self) -> np.ndarray:
        """Numbers of rows, by the share of its own source that comes before each."""
        return np.argsort(
            np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in self.parts]), kind="stable"
        )

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = int(self._order[index]) if self.spread else index
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.read_row(number, index - self._starts[number])

    def read_row(self, number: int, index: int) -> dict[str, np.ndarray]:
        """A row of the source of that number."""
        return self.parts[number][index] | {"sources": np.array(number, np.int32)}

    def shuffle(self, seed: int) -> grain.MapDataset:
        """The rows in the order of training, without end."""
        if not self.weights:
            return grain.MapDataset.source(self).shuffle(seed).repeat()
        datasets = []
        for number, part in enumerate(self.parts):
            # Grain shuffles epoch n by seed + n, which shall not be the next source's first.
            dataset = grain.MapDataset.range(len(part)).shuffle((seed + number * 1_000_003) % 2**32).repeat()
            datasets.append(dataset.map(_RowReader(self, number)))
        return grain.MapDataset.select_from_datasets(datasets, self.schedule)

    @property
    def shares(self) -> list[float]:
        """How much of the rows each source gives; they add up to 1."""
        counts = self.weights or [*map(len, self.parts)]
        return [float(count / sum(counts)) for count in counts]

    @cached_property
    def schedule(self) -> Schedule:
        """Which row of a mixture with weights is whose."""
        return Schedule(self.weights)

    def count_epochs(self, rows: int) -> dict[str, float]:
        """How often the first rows go through each source, by its name."""
        counts = (
            self.schedule.count_rows(rows) if self.weights else [rows * len(part) / len(self) for part in self.parts]
        )
        return {
            source.name: count / len(part) for source, part, count in zip(self.sources, self.parts, counts, strict=True)
        }


@dataclass(frozen=True)
class _RowReader:
    rows: MixedRows
    source: int

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        return self.rows.read_row(self.source, index)
