"""Compares the weights of two checkpoints of any formats, says what explains their differences, and computes logits.

Arrays are compared by our paths and layouts, a layer at a time, so that memory stays bounded. `known_changes` has the
explanations of a single array; the conclusion here is drawn from all of them.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma2_jax.config import ComputeConfig
from gemma2_jax.convert.checkpoints import Checkpoint, describe_model_differences, load_weights, read_array
from gemma2_jax.convert.files import gguf, orbax
from gemma2_jax.convert.files.memory import Index
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.formats.table import Row
from gemma2_jax.convert.known_changes import Change, explains, known_changes, low_rank
from gemma2_jax.convert.sources import TensorSource
from gemma2_jax.model import gemma2, lora
from gemma2_jax.model.attention.choice import choose_attention
from gemma2_jax.model.gemma2 import Gemma2
from gemma2_jax.model_config import is_adapter_path

_TUNED = 0.5  # the largest relative difference of an array that further training may explain
_UNRELATED = 1.0  # independent weights of one size differ by sqrt(2) of themselves
# What quantizing to n bits may change, times 2**-n: it was 1.25 of normal values in each of llama.cpp's formats.
_QUANTIZED = 2.0


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How the array at one path differs between two checkpoints."""

    path: str
    dtypes: tuple[str, str]
    unequal: int  # elements whose bits differ, or whose values differ if the dtypes do
    size: int  # elements
    largest: float  # the largest difference of two elements; NaN where one of them is NaN
    relative: float = 0.0  # L2 norm of the difference divided by that of the first, over the layers that differ
    explanation: str = ""  # the known change that turns the first into the second; empty: there is none
    rank: int | None = None  # the largest rank of a layer's difference; None: it is not low

    def within(self, tolerance: float) -> bool:
        """Whether the arrays count as the same. Without a tolerance, their dtypes and all bits must agree."""
        if not tolerance:
            return self.unequal == 0 and self.dtypes[0] == self.dtypes[1]
        return self.largest <= tolerance

    @property
    def kind(self) -> str:
        """The group of the array: "embedding", "norms", "projections" or "adapters"."""
        if is_adapter_path(self.path):
            return "adapters"
        return "embedding" if self.path == "embedding" else "norms" if "norm" in self.path else "projections"

    @property
    def name(self) -> str:
        """The path without what all paths begin and end with: "attn/q"."""
        return self.path.removeprefix("blocks/").removesuffix("/w")


def compare_checkpoints(
    first: Checkpoint, second: Checkpoint, progress: Callable[[float], None] = lambda size: None
) -> list[Difference]:
    """How every array compares.

    Args:
      progress: is called with the number of bytes of `first` compared since the last call.

    Raises ValueError where one checkpoint lacks an array of the other, or has it in another shape, with what to compare
    instead.
    """
    for checkpoint in (first, second):
        if checkpoint.model is None:
            raise ValueError(
                f"{checkpoint.describe_missing_base()}; give the folder of the model's config.json as --hf-config"
            )
    shapes = first.shapes
    for path in [*shapes, *second.shapes]:
        pair = [tuple(x.shapes[path].shape) if path in x.shapes else None for x in (first, second)]
        if pair[0] != pair[1]:
            clauses = [f"has {path} with shape {shape}" if shape else f"has no {path}" for shape in pair]
            reason = f"{first.path} {clauses[0]}, and {second.path} {clauses[1]}"
            differences = describe_config_differences(first, second)
            if all(pair) and differences:
                raise ValueError(f"{reason}; they are models of different sizes: {differences}")
            raise ValueError(f"{reason}; {_suggest_merge(first, second)}")
    assert first.model
    rows = {row.path: row for row in (*table.MODEL, *table.table_rows(first.adapter, first.model.layers))}
    return [_compare_arrays(rows[path], first, second, progress) for path in shapes]


def _suggest_merge(first: Checkpoint, second: Checkpoint) -> str:
    """What can be compared of two checkpoints with other arrays: the weights that their adapters make of the model."""
    if not (first.has_weights and second.has_weights):
        return "one is an adapter alone: give its model's weights to both, or to none"
    commands, after_norm = list[str](), list[str]()
    for checkpoint, target in ((first, "FIRST"), (second, "SECOND")):
        words = ["python", "-m", "gemma2_jax.convert", str(checkpoint.path), target, "--merge", "--to", "hf"]
        commands += [shlex.join(words)] if checkpoint.adapter.kind != "none" else []
        after_norm += checkpoint.adapter.unmergeable_targets
    if after_norm:
        return (
            "an adapter that is added after the post-norm (adapter.after_norm) cannot be merged, and compares with "
            "others of its projections alone"
        )
    return f"merge what is an adapter into its model, and compare that: {' and '.join(commands)}"


def describe_adapter_differences(first: Checkpoint, second: Checkpoint) -> str:
    """What makes the same arrays of two adapters different functions: scales, places and tokens; may be empty."""
    assert first.model
    layers, adapters = range(first.model.layers), (first.adapter, second.adapter)
    scales = [[x.layer_scale(name, layer) for name in table.match_targets(x) for layer in layers] for x in adapters]
    values = [" ".join(f"{scale:g}" for scale in sorted(set(found))) for found in scales]
    differences = {
        f"the scale (alpha, rank and rslora) is {values[0]} and {values[1]}": scales[0] != scales[1],
        "one is added after the post-norm (adapter.after_norm)": bool(adapters[0].unmergeable_targets)
        != bool(adapters[1].unmergeable_targets),
        "their rows are of other tokens (adapter.trainable_tokens)": adapters[0].trainable_tokens
        != adapters[1].trainable_tokens,
    }
    return "; ".join(sentence for sentence, differ in differences.items() if differ)


def list_dtypes(arrays: list[Difference], every: list[Difference]) -> list[str]:
    """A sentence for each pair of dtypes that differ, with the arrays that have them."""
    groups: dict[tuple[str, str], list[Difference]] = {}
    for array in arrays:
        groups.setdefault(array.dtypes, []).append(array)
    return [
        f"of {_describe_arrays(group, every)} the first has {dtypes[0]} and the second {dtypes[1]}"
        for dtypes, group in groups.items()
        if dtypes[0] != dtypes[1]
    ]


def describe_config_differences(first: Checkpoint, second: Checkpoint) -> str:
    """The fields in which the configs of two models differ, without the length of their training rows; may be empty."""
    assert first.model and second.model
    return describe_model_differences(first.model, replace(second.model, max_length=first.model.max_length))


@dataclass(kw_only=True)
class _Tally:
    """What the comparison has found about an array so far, layer by layer."""

    changes: list[Change]  # those that explain all layers that differ
    layers: int = 0  # that differ
    unequal: int = 0
    largest: float = 0.0
    squares: float = 0.0  # of the first's elements, in layers that differ
    difference_squares: float = 0.0
    ranks: list[int] = field(default_factory=list)  # of the differences of layers
    full_rank: bool = False  # whether that of a layer was not low

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Counts a layer and its elements; returns their difference in float32."""
        self.layers += 1
        a, b = a.astype(np.float32), b.astype(np.float32)
        self.unequal += int(np.sum((a != b) | (np.signbit(a) != np.signbit(b))))
        with np.errstate(invalid="ignore", over="ignore"):
            difference = b - a
            self.largest = float(np.maximum(self.largest, np.max(np.abs(difference))))  # np.maximum keeps a NaN
            self.squares += _square_sum(a)
            self.difference_squares += _square_sum(difference)
        return difference

    def add_rank(self, difference: np.ndarray, stored: np.ndarray) -> None:
        """Finds the rank of a layer's difference, unless that of an earlier layer is not low."""
        if self.full_rank:
            return
        rank = low_rank(difference, stored)
        self.full_rank = rank is None
        self.ranks += [] if rank is None else [rank]

    @property
    def rank(self) -> int | None:
        """The largest rank of a layer's difference, or None where one is not low."""
        return None if self.full_rank else max(self.ranks, default=None)


def _compare_arrays(row: Row, first: Checkpoint, second: Checkpoint, progress: Callable[[float], None]) -> Difference:
    path, stored = row.path, first.shapes[row.path]
    dtypes = stored.dtype.name, second.shapes[path].dtype.name
    assert first.model
    cast = [Change(f"in {dtypes[1]}", lambda tensor: tensor, path)] if dtypes[0] != dtypes[1] else []
    known = [change for change in known_changes(row, first.model) if _fits(change, path, first)]
    tally = _Tally(changes=cast + known)
    for index in _pieces(row, first):
        a, b = (_read_tensor(row, checkpoint, index) for checkpoint in (first, second))
        progress(a.nbytes)
        if dtypes[0] == dtypes[1] and _same_bits(a, b):
            continue
        tally.changes = [
            change
            for change in tally.changes
            if explains(change, a if change.path == path else _read_tensor(_row(change.path), first, index), b)
        ]
        difference = tally.add(a, b)
        if not tally.changes and row in table.PROJECTIONS.values():
            tally.add_rank(difference, b)
    relative = _ratio(tally.difference_squares, tally.squares) ** 0.5
    explanation = tally.changes[0].description if tally.layers and tally.changes else ""
    if tally.layers and not tally.changes:
        explanation = _explain_quantized(row, (first, second), relative)
    if explanation and row.stacked and tally.layers < stored.shape[0]:
        explanation += f" in {tally.layers} of {stored.shape[0]} layers"
    return Difference(
        path=path,
        dtypes=dtypes,
        unequal=tally.unequal,
        size=int(np.prod(stored.shape, dtype=np.int64)),
        largest=tally.largest,
        relative=relative,
        explanation=explanation,
        rank=tally.rank,
    )


def _explain_quantized(row: Row, pair: tuple[Checkpoint, Checkpoint], relative: float) -> str:
    """The explanation of a difference no larger than quantizing makes, where an array is quantized; else empty."""
    types = set[str]()
    for checkpoint in pair:
        source = checkpoint.find_source(row.path)
        if isinstance(source, TensorSource):
            names = source.rows[row.path].names(source.model.layers)
            tensors = (source.tensors.by_name[name] for name in names)
            types |= {tensor.type for tensor in tensors if isinstance(tensor, gguf.Tensor) and tensor.quantized}
    bits = [int(digits[0]) for kind in types if (digits := re.search(r"\d", kind))]
    explained = bits and relative <= _QUANTIZED * 2.0 ** -min(bits)
    return f"but for what {' and '.join(sorted(types))} rounds" if explained else ""


def _pieces(row: Row, checkpoint: Checkpoint) -> Iterator[Index]:
    """The parts of an array that are compared at a time: a layer, or some rows of an array that is not stacked."""
    stored = checkpoint.shapes[row.path]
    step = 1 if row.stacked else orbax.rows_at_once(stored, stacked=False)
    for start in range(0, stored.shape[0], step):
        yield (slice(start, min(start + step, stored.shape[0])), *[slice(None)] * (len(stored.shape) - 1))


def _read_tensor(row: Row, checkpoint: Checkpoint, index: Index) -> np.ndarray:
    """A piece of an array in the layout of Hugging Face's tensor."""
    array = read_array(checkpoint, row.path, index)
    return row.to_tensor(array[0] if row.stacked else array)


def _row(path: str) -> Row:
    return next(row for row in table.MODEL if row.path == path)


def _fits(change: Change, path: str, checkpoint: Checkpoint) -> bool:
    """Whether the array that a change is applied to exists, and has the shape of the one that is compared."""
    shapes = checkpoint.shapes
    return change.path == path or (change.path in shapes and shapes[change.path].shape == shapes[path].shape)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return np.array_equal(a.view(bits), b.view(bits))


def _square_sum(array: np.ndarray) -> float:
    flat = array.ravel("K")  # in the order of its memory, which makes no copy
    return float(flat @ flat)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("inf" if part else 0)


def conclude(arrays: list[Difference], tolerance: float = 0.0) -> str:
    """One sentence on what two checkpoints are to each other."""
    different = [array for array in arrays if not array.within(tolerance)]
    if not different:
        return f"They hold the same weights, {f'within {tolerance:g}' if tolerance else 'bit by bit'}."
    unexplained = [array for array in different if not array.explanation]
    explained = _list_explanations([array for array in different if array.explanation], arrays)
    rest = "" if len(different) == len(arrays) else "; all else is the same"
    if not unexplained:
        return f"The second holds the weights of the first, stored otherwise: {explained}{rest}."
    if explained:
        rest = f". Of what else differs, the second holds the first's stored otherwise: {explained}{rest}"
    # A difference in a few elements has a low rank too, and is no adapter's.
    ranks = [array.rank for array in unexplained if array.rank and array.unequal * 100 >= array.size]
    if len(ranks) == len(unexplained):
        names = _join_words([array.name for array in unexplained])
        return f"One is the other with an adapter of rank {max(ranks)} merged into {names}{rest}."
    low, high = _relative_span(unexplained)
    span = "relative L2 " + " to ".join(dict.fromkeys(f"{value:.2g}" for value in (low, high)))
    matrices = [array for array in arrays if array.kind == "projections"]
    changed = [array for array in unexplained if array.kind == "projections"]
    if changed and len(changed) == len(matrices):
        low, high = _relative_span(changed)
        if high <= _TUNED:
            return f"All projections differ by little ({span}), as in a model and one that was tuned from it{rest}."
        if low >= _UNRELATED:
            return f"They are models of one size that have nothing in common ({span}){rest}."
    return f"They differ in {_describe_arrays(unexplained, arrays)}, by no change that is known ({span}){rest}."


def _relative_span(arrays: list[Difference]) -> tuple[float, float]:
    """The smallest and the largest relative difference, where NaN is the largest."""
    relative = sorted((array.relative for array in arrays), key=lambda value: (np.isnan(value), value))
    return relative[0], relative[-1]


def _list_explanations(explained: list[Difference], arrays: list[Difference]) -> str:
    groups: dict[str, list[Difference]] = {}
    for array in explained:
        groups.setdefault(array.explanation, []).append(array)
    return "; ".join(f"{_describe_arrays(group, arrays)} {change}" for change, group in groups.items())


def _describe_arrays(chosen: list[Difference], arrays: list[Difference]) -> str:
    """Names the chosen arrays, by their groups if those are whole, else one by one."""
    if len(chosen) == len(arrays):
        return "all arrays"
    kinds = list(dict.fromkeys(array.kind for array in chosen))
    if len(chosen) > 2 and len(chosen) == sum(array.kind in kinds for array in arrays):
        return _join_words(["the embedding" if kind == "embedding" else f"all {kind}" for kind in kinds])
    names = [array.name for array in chosen]
    return _join_words([*names[:4], f"{len(names) - 4} more"] if len(names) > 5 else names)


def _join_words(words: list[str]) -> str:
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1]


def check_weights(checkpoint: Checkpoint) -> None:
    """Raises ValueError where a checkpoint is an adapter alone, from which no logits can be computed."""
    if checkpoint.lacks_base:
        raise ValueError(
            f"{checkpoint.describe_missing_base()}, so it has no logits; put it on that model first with "
            f"python -m gemma2_jax.convert MODEL NEW --adapter {checkpoint.path} --to orbax"
        )


def compute_logits(checkpoint: Checkpoint, tokens: Sequence[int]) -> np.ndarray:
    """Logits [T, V] in float32 of T tokens, with the adapter. Raises ValueError where an adapter lacks its model."""
    check_weights(checkpoint)
    config = checkpoint.model
    assert config is not None
    attention, _ = choose_attention(config, ComputeConfig(dtype="float32"), jax.devices()[0])

    def create() -> Gemma2:
        gemma = Gemma2(config, attention=attention, dtype="float32", rngs=nnx.Rngs(0))
        lora.attach_adapters(gemma, checkpoint.adapter, rngs=nnx.Rngs(0))
        return gemma

    graph, shapes = nnx.split(nnx.eval_shape(create))
    wanted = {path: jax.ShapeDtypeStruct(w.shape, w.dtype) for path, w in gemma2.flatten_state(shapes).items()}
    tokens_1T = jnp.asarray(tokens, jnp.int32)[None]

    @jax.jit
    def run(weights):
        return gemma2.rebuild_model(graph, weights)(tokens_1T)[0]

    return np.asarray(run(load_weights(checkpoint, wanted)))
