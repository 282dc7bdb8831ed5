"""The plan of which documents are in which row, kept in a file beside the tokens that every process memory-maps."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma2_jax.data.cache import hold_lock
from gemma2_jax.data.store import Store

logger = logging.getLogger(__name__)

FORMAT = 1  # to be raised when the code plans other rows for the same documents, or writes another file for them
KINDS = ("single", "whole", "cut")  # a document in each row, several whole ones, or all end to end and cut
# What a file begins with, the kind as its number in KINDS; the bounds and the order of documents follow.
_TOTALS = ("kind", "rows", "documents", "tokens", "targets", "truncated", "dropped")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which documents, whole or cut, are in which row."""

    kind: str  # one of KINDS
    rows: int
    documents: int  # in the rows, whole or cut
    tokens: int  # in the rows, padding not counted
    targets: int  # tokens that count in the loss, over all rows
    truncated: int  # documents that lost their end
    dropped: int  # documents left out, because all their learned tokens were in the end that they would lose
    bounds: np.ndarray  # int64 [rows + 1], the first of each row's documents in `order`, and the number of documents;
    # or, if they are cut, [documents], where each ends when they are put end to end
    order: np.ndarray  # int64 [documents]: numbers of documents in the store, by the row they are in


def keep_plan(store: Store, name: str, make_plan: Callable[[], Plan]) -> Plan:
    """The plan of that name in the store's folder; if there is none, or a damaged one, one is made and kept there.

    One process makes it, and others that need it wait. A plan that cannot be written is returned, after a warning.
    """
    if store.folder is None:
        return make_plan()
    path = store.folder / f"plan-{FORMAT}-{name}.npy"
    with contextlib.suppress(ValueError, OSError, EOFError):
        return _open_plan(path, store)
    plan = None
    try:
        with hold_lock(store.folder) as lock:
            plan = _reopen_plan(path, store)
            if plan is None:
                plan = make_plan()
                partial = lock.name_partial(path)
                _write_plan(partial, plan)
                partial.replace(path)
                plan = _open_plan(path, store)
    except OSError as error:
        logger.warning("the plan of rows could not be written to %s (%s); each process makes its own", path, error)
    return plan or make_plan()


def _reopen_plan(path: Path, store: Store) -> Plan | None:
    """The plan, if another process has made it meanwhile; None, after a warning, where it is damaged."""
    try:
        return _open_plan(path, store)
    except FileNotFoundError:
        pass
    except (ValueError, OSError, EOFError) as error:
        logger.warning("the plan of rows in %s is damaged (%s), and is made again", path, error)
    return None


def _write_plan(partial: Path, plan: Plan) -> None:
    totals = [getattr(plan, name) for name in _TOTALS[1:]]
    parts = np.array([KINDS.index(plan.kind), *totals], np.int64), plan.bounds, plan.order
    try:
        with partial.open("wb") as file:
            shape = (sum(map(len, parts)),)
            np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
            for part in parts:
                part.astype("<i8", copy=False).tofile(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _open_plan(path: Path, store: Store) -> Plan:
    """The plan in a file. Raises ValueError where it is not whole, or not of that store."""
    numbers = np.load(path, mmap_mode="r")
    totals = dict(zip(_TOTALS, numbers[: len(_TOTALS)].tolist(), strict=True))
    kind, documents = KINDS[totals.pop("kind")], totals["documents"]
    bounds, order = np.split(numbers[len(_TOTALS) :], [documents if kind == "cut" else totals["rows"] + 1])
    end = store.offsets[-1] if kind == "cut" else documents
    if len(order) != documents or documents + totals["dropped"] != len(store.offsets) - 1 or bounds[-1] != end:
        raise ValueError("its parts do not belong together")
    return Plan(kind=kind, **totals, bounds=bounds, order=order)
