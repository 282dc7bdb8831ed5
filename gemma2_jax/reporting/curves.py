"""Metrics over steps in memory that does not grow with the run: what a curve of millions of steps keeps of them.

Up to BUCKETS steps are kept as they are. Of more, neighbors share a bucket, all of the same number of steps. It keeps
its lowest, its highest and its last value, their sum and their number. So a spike of one step in a million stays, and
sums and means are those of all steps.
"""

import sys
from dataclasses import dataclass

import numpy as np

BUCKETS = 2000  # of a curve, at most
_ROW = np.dtype(
    [
        *(("last_step", np.int64), ("last", np.float64), ("low_step", np.int64), ("low", np.float64)),
        *(("high_step", np.int64), ("high", np.float64), ("sum", np.float64), ("count", np.int64)),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One metric over steps."""

    steps: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def last(self) -> float:
        """The value of the last step."""
        return self.values[-1]


class Curve:
    """One metric over steps, as they are read. A step that is given again counts as it was given last.

    Where a bucket of several steps is given again from some step on, the steps before that one are forgotten.
    """

    def __init__(self) -> None:
        self.width = 1  # steps of a bucket
        self._rows = np.zeros(0, _ROW)  # of the buckets, in order

    def add(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Takes values [n], float64, of steps [n], int64. Values that are not finite are left out.

        Buckets are made wider where they become too many.
        """
        finite = np.isfinite(values)
        steps, values = steps[finite], values[finite]
        if not len(steps):
            return
        if np.any(np.diff(steps) <= 0):  # of a step that is given again, the last
            steps, last = np.unique(steps[::-1], return_index=True)
            values = values[::-1][last]
        points = np.empty(len(steps), _ROW)
        for name in ("last", "low", "high"):
            points[f"{name}_step"], points[name] = steps, values
        points["sum"], points["count"] = values, 1
        kept = self._rows
        nearest = np.searchsorted(steps, kept["last_step"] // self.width * self.width)
        is_retaken = np.append(steps, sys.maxsize)[nearest] <= kept["last_step"]
        rows = np.concatenate([kept[~is_retaken], points])
        rows = rows[np.argsort(rows["last_step"], kind="stable")]
        while len(merged := _merge_rows(rows, self.width)) > BUCKETS:
            self.width *= 2
        self._rows = merged

    @property
    def series(self) -> Series:
        """The lowest and the highest value of each bucket, and the last of all."""
        rows = self._rows
        steps = np.concatenate([rows["low_step"], rows["high_step"], rows["last_step"][-1:]])
        values = np.concatenate([rows["low"], rows["high"], rows["last"][-1:]])
        steps, first = np.unique(steps, return_index=True)
        return Series(steps=steps.tolist(), values=values[first].tolist())

    @property
    def means(self) -> Series:
        """The mean of each bucket, at its last step."""
        rows = self._rows
        return Series(steps=rows["last_step"].tolist(), values=(rows["sum"] / rows["count"]).tolist())

    @property
    def sum(self) -> float:
        """All values added up."""
        return float(self._rows["sum"].sum())


def _merge_rows(rows: np.ndarray, width: int) -> np.ndarray:
    """Rows in order as one for each bucket of so many steps."""
    keys = rows["last_step"] // width
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    ends = np.append(starts[1:], len(rows))
    merged = rows[ends - 1]
    for name, extreme in (("low", np.minimum), ("high", np.maximum)):
        reached = rows[name] == np.repeat(extreme.reduceat(rows[name], starts), ends - starts)
        places = np.flatnonzero(reached)
        first = rows[places[np.searchsorted(places, starts)]]
        merged[f"{name}_step"], merged[name] = first[f"{name}_step"], first[name]
    for name in ("sum", "count"):
        merged[name] = np.add.reduceat(rows[name], starts)
    return merged
