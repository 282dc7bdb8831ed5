"""What may explain that two tensors differ: known ways of storing Gemma 2's tensors, and a difference of low rank.

A change turns one layer's tensor, in Hugging Face's layout, into what a program holds that stores it differently. No
checkpoint is read here; `verify` tries the changes while it compares two.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import jax.numpy as jnp
import numpy as np

from gemma2_jax.convert.formats import table
from gemma2_jax.convert.formats.table import Row
from gemma2_jax.model_config import ModelConfig

_MOST_RANK = 64  # the largest rank that counts as low; finding it takes twice as many products with a vector
_SIZES = (2, 4, 8)  # tensor-parallel sizes whose order of rows is tried


@dataclass(frozen=True)
class Change:
    """One way of storing a tensor differently."""

    description: str  # what follows "the second is the first"
    apply: Callable[[np.ndarray], np.ndarray]
    path: str  # the array that it is applied to; where projections were swapped, not the one that is compared
    rounds: bool = False  # True if it computes new values, which are rounded when stored; False if it only moves values


def known_changes(row: Row, model: ModelConfig) -> list[Change]:
    """The known changes that apply to tensors of this row."""
    group, _, name = row.path.removeprefix("blocks/").removesuffix("/w").partition("/")
    found = list[Change]()
    if group.endswith("norm"):
        found = _scaled(row.path, "plus 1", "minus 1", lambda w: w + 1, lambda w: w - 1)
    elif row.path == "embedding":
        found = _times(row.path, "sqrt(width)", math.sqrt(model.width))
    elif group == "attn":
        found = _attention_changes(row, model, name)
    elif name in ("gate", "up"):
        found = [_swapped(f"mlp/{'up' if name == 'gate' else 'gate'}")]
    elif name in ("gate/adapter/b", "up/adapter/b"):
        found = [
            Change(f"in the order of the rows of TP {size}", partial(order, ranks=size), row.path)
            for size in _SIZES
            if model.mlp_width % (2 * size) == 0
            for order in (_split_ranks, _join_ranks)
        ]
    # One that moves values and one that computes others; the rest undo each other, or nobody has seen them together.
    pairs = [_both(*pair) for pair in combinations(found, 2) if pair[0].rounds != pair[1].rounds]
    square = row.path.endswith("/w") and len(row.groups) == 2
    return found + [Change("transposed", np.transpose, row.path)] * square + pairs


def _both(first: Change, second: Change) -> Change:
    """Two changes, one after the other, of the array that is compared or of the one that is in its place."""
    return Change(
        f"{first.description} and {second.description}",
        lambda tensor: second.apply(first.apply(tensor)),
        second.path if first.rounds else first.path,
        rounds=first.rounds or second.rounds,
    )


def _attention_changes(row: Row, model: ModelConfig, name: str) -> list[Change]:
    found = list[Change]()
    if name in ("q", "k", "q/adapter/b", "k/adapter/b"):
        width = model.head_width
        found += [
            Change("with rotary pairs side by side, not in halves", partial(_pair_rotary, width=width), row.path),
            Change("with rotary pairs in halves, not side by side", partial(_halve_rotary, width=width), row.path),
        ]
    if name in ("q", "q/adapter/b"):
        found += _times(row.path, "sqrt(query_pre_attn_scalar)", math.sqrt(model.query_pre_attn_scalar))
    return found + [_swapped(f"attn/{other}") for other in "qkv" if name in tuple("qkv") and other != name]


def _scaled(path: str, first: str, second: str, there: Callable, back: Callable) -> list[Change]:
    return [Change(first, there, path, rounds=True), Change(second, back, path, rounds=True)]


def _times(path: str, name: str, factor: float) -> list[Change]:
    return _scaled(path, f"times {name}", f"divided by {name}", lambda w: w * factor, lambda w: w / factor)


def _swapped(other: str) -> Change:
    return Change(f"with {other} in its place", lambda tensor: tensor, table.PROJECTIONS[other].path)


def _pair_rotary(tensor: np.ndarray, width: int) -> np.ndarray:
    return tensor.reshape(-1, 2, width // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _halve_rotary(tensor: np.ndarray, width: int) -> np.ndarray:
    return tensor.reshape(-1, width // 2, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _split_ranks(tensor: np.ndarray, ranks: int) -> np.ndarray:
    return tensor.reshape(ranks, 2, -1, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)


def _join_ranks(tensor: np.ndarray, ranks: int) -> np.ndarray:
    return tensor.reshape(2, ranks, -1, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)


def explains(change: Change, tensor: np.ndarray, found: np.ndarray) -> bool:
    """Whether the changed tensor is the one that was found, up to rounding to the dtypes of both."""
    if not change.rounds:
        coarse = max(tensor.dtype, found.dtype, key=_epsilon)
        changed, found = (x.astype(coarse, copy=False) for x in (change.apply(tensor), found))
        return np.array_equal(changed, found)
    a, b = tensor.astype(np.float32), found.astype(np.float32)
    changed = change.apply(a)
    # The tensor, what was computed from it and what was stored may each have been rounded.
    rounding = 2 * max(_epsilon(tensor.dtype), _epsilon(found.dtype))
    return bool(np.all(np.abs(changed - b) <= rounding * np.maximum(np.abs(a), np.abs(b))))


def low_rank(difference: np.ndarray, stored: np.ndarray) -> int | None:
    """The rank of the difference of two matrices in float32, or None if it is not low.

    `stored` is one of the two; noise of the size of rounding to its dtype does not count. The range of the difference
    is found by products with random vectors (arXiv:0909.4061, algorithm 4.1).
    """
    columns = difference.shape[1]
    most = min(_MOST_RANK, min(difference.shape) // 4)
    total = float(np.linalg.norm(difference))
    if most < 1 or not math.isfinite(total):
        return None
    random = np.random.default_rng(0).standard_normal((columns, 2 * most), np.float32)
    basis = np.linalg.qr(difference @ random)[0]
    values = np.linalg.svd(basis.T @ difference, compute_uv=False)
    # Rounding adds noise of 0.2 epsilon of a value in the mean square. The norm of a matrix of noise is at most about
    # that of its largest row plus that of its largest column (arXiv:1408.6185).
    sizes = stored.astype(np.float32)
    noise = 0.2 * _epsilon(stored.dtype)
    largest = sum(float(np.sqrt(np.max(np.einsum(f"ij,ij->{kept}", sizes, sizes)))) for kept in "ij")
    rank = int(np.sum(values > max(1.5 * noise * largest, 1e-4 * values[0])))
    rest = math.sqrt(max(total**2 - float(np.sum(np.square(values[:rank], dtype=np.float64))), 0))
    # What a matrix of this rank does not explain must be noise, and less than half of the difference.
    most_rest = min(1.5 * noise * float(np.linalg.norm(sizes)) + 1e-3 * total, 0.5 * total)
    return rank if 0 < rank <= most and rest <= most_rest else None


def _epsilon(dtype: np.dtype) -> float:
    """The distance of 1 from the next value of a dtype."""
    return float(jnp.finfo(dtype).eps)
