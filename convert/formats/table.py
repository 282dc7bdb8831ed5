"""The one table of names and layouts: our weights, Hugging Face's tensors and, derived from it, PEFT's.

A row reads left to right on import and right to left on export. Layouts are einops patterns in the letters of
`dims`; a row whose name holds `{L}` is one tensor per layer there and one array stacked on L here. Every tensor on
either side is claimed by exactly one row, or it is an error that names it. Values are never changed. Where tensors
are stored, in which dtype and on which device is decided by callers: a tensor is whatever `read` returns.
"""

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from einops import rearrange

from gemma2_jax import dims
from gemma2_jax.config import AdapterConfig, ModelConfig
from gemma2_jax.convert.files.memory import Index, Shapes, copy_array

HEAD = "lm_head.weight"  # Hugging Face's output matrix: Gemma 2's is the embedding, so that no row has it


@dataclass(frozen=True)
class Row:
    """One array of ours and what it is over there."""

    path: str  # our path
    dims: str  # our dims
    name: str  # their name; {L} stands for the layer
    layout: str  # their dims; a group such as (N H) is one dim

    @property
    def stacked(self) -> bool:
        """Whether theirs is a tensor per layer."""
        return "{L}" in self.name

    @property
    def letters(self) -> str:
        """Our dims as the model spells them: "LDNH"."""
        return self.dims.replace(" ", "")

    @property
    def groups(self) -> list[str]:
        """The letters of each of their dims: ["NH", "D"]."""
        found = re.findall(r"\(([A-Z ]+)\)|([A-Z])", self.layout)
        return [(group or letter).replace(" ", "") for group, letter in found]

    @property
    def layer_dims(self) -> str:
        """Our dims of what one of their tensors holds."""
        return self.dims.removeprefix("L ") if self.stacked else self.dims

    def names(self, layers: int) -> list[str]:
        """Their names, in the order of our L."""
        return [self.name.format(L=layer) for layer in range(layers)] if self.stacked else [self.name]

    def join(self, size: Mapping[str, int], dtype, read: Callable[[str, Index], np.ndarray], index: Index):
        """The part `index` of our array, of which only what it needs is asked of `read(their name, slices)`.

        Of one layer, or of what is not stacked, it is a view of what was read, in their order in memory.
        """
        spans = {letter: range(size[letter])[at] for letter, at in zip(self.letters, index, strict=True)}
        inner = {group[0]: math.prod(size[letter] for letter in group[1:]) for group in self.groups}
        theirs = tuple(slice(spans[first].start * times, spans[first].stop * times) for first, times in inner.items())
        # Within a group only the first letter can be cut while reading; the others are cut from what was read.
        letters = self.layer_dims.replace(" ", "")
        lengths = {letter: len(spans[letter]) if letter in inner else size[letter] for letter in letters}
        rest = tuple(slice(None) if letter in inner else index[self.letters.index(letter)] for letter in letters)

        def layer(name: str) -> np.ndarray:
            return rearrange(read(name, theirs), f"{self.layout} -> {self.layer_dims}", **lengths)[rest]

        if not self.stacked:
            return layer(self.name).astype(dtype, copy=False)
        if len(spans["L"]) == 1:  # which needs no copy
            return layer(self.name.format(L=spans["L"].start))[None].astype(dtype, copy=False)
        ours = np.empty([len(span) for span in spans.values()], dtype)
        for at, number in enumerate(spans["L"]):
            copy_array(ours[at], layer(self.name.format(L=number)))
        return ours

    def theirs(self, ours: np.ndarray) -> np.ndarray:
        """Their tensor of our array, of one layer if stacked and without that dim, or of a part of it; as a view."""
        return rearrange(ours, f"{self.layer_dims} -> {self.layout}")

    def split(self, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Their tensors of our whole array, as views of it."""
        names = self.names(len(array))
        for name, part in zip(names, array if self.stacked else [array], strict=True):
            yield name, self.theirs(part)


_LAYER = "model.layers.{L}"
MODEL = (
    Row("embedding", "V D", "model.embed_tokens.weight", "V D"),
    Row("blocks/pre_attn_norm/w", "L D", f"{_LAYER}.input_layernorm.weight", "D"),
    Row("blocks/attn/q/w", "L D N H", f"{_LAYER}.self_attn.q_proj.weight", "(N H) D"),
    Row("blocks/attn/k/w", "L D K H", f"{_LAYER}.self_attn.k_proj.weight", "(K H) D"),
    Row("blocks/attn/v/w", "L D K H", f"{_LAYER}.self_attn.v_proj.weight", "(K H) D"),
    Row("blocks/attn/o/w", "L N H D", f"{_LAYER}.self_attn.o_proj.weight", "D (N H)"),
    Row("blocks/post_attn_norm/w", "L D", f"{_LAYER}.post_attention_layernorm.weight", "D"),
    Row("blocks/pre_mlp_norm/w", "L D", f"{_LAYER}.pre_feedforward_layernorm.weight", "D"),
    Row("blocks/mlp/gate/w", "L D F", f"{_LAYER}.mlp.gate_proj.weight", "F D"),
    Row("blocks/mlp/up/w", "L D F", f"{_LAYER}.mlp.up_proj.weight", "F D"),
    Row("blocks/mlp/down/w", "L F D", f"{_LAYER}.mlp.down_proj.weight", "D F"),
    Row("blocks/post_mlp_norm/w", "L D", f"{_LAYER}.post_feedforward_layernorm.weight", "D"),
    Row("final_norm/w", "D", "model.norm.weight", "D"),
)
# Their matrices are [out, in]: those two are what an adapter's B and A share with its weight.
PROJECTIONS = {
    row.path.split("/", 1)[1].removesuffix("/w"): row for row in MODEL if row.stacked and row.letters != "LD"
}


def adapter_rows(projection: str) -> dict[str, Row]:
    """PEFT's rows for the adapter of a projection such as "attn/q": its a, b and, of DoRA, m."""
    row = PROJECTIONS[projection]
    produced, contracted = row.groups
    path = row.path.removesuffix("w") + "adapter"
    name = "base_model.model." + row.name.removesuffix(".weight")
    out, into = " ".join(produced), " ".join(contracted)
    return {
        "a": Row(f"{path}/a", f"L {into} R", f"{name}.lora_A.weight", f"R ({into})"),
        "b": Row(f"{path}/b", f"L R {out}", f"{name}.lora_B.weight", f"({out}) R"),
        "m": Row(f"{path}/m", f"L {out}", f"{name}.lora_magnitude_vector", f"({out})"),
    }


def match_targets(adapter: AdapterConfig) -> list[str]:
    """The projections that have an adapter."""
    if adapter.kind == "none":
        return []
    return [name for name in PROJECTIONS if any(fnmatch.fnmatch(name, target) for target in adapter.targets)]


def adapted_rows(found: Iterable[str]) -> list[str]:
    """The projections of which an adapter's array is found, by our path or by PEFT's name with {L} for the layer."""
    names = set(found)
    return [
        projection
        for projection in PROJECTIONS
        if any(row.path in names or row.name in names for row in adapter_rows(projection).values())
    ]


def table_rows(adapter: AdapterConfig) -> tuple[Row, ...]:
    """The rows of a model's adapters."""
    return tuple(
        row
        for projection in match_targets(adapter)
        for part, row in adapter_rows(projection).items()
        if part != "m" or adapter.kind == "dora"
    )


def our_shapes(rows: tuple[Row, ...], config: ModelConfig, rank: int = 0) -> Shapes:
    """Our arrays of these rows, by path."""
    return {row.path: dims.weight_shape(row.letters, config, rank) for row in rows}


def their_shapes(rows: tuple[Row, ...], config: ModelConfig, rank: int = 0) -> Shapes:
    """Their tensors of these rows, by name."""
    shapes = {
        row.name: tuple(math.prod(dims.weight_shape(group, config, rank)) for group in row.groups) for row in rows
    }
    return {name: shapes[row.name] for row in rows for name in row.names(config.layers)}


def claim_tensors(expected: Shapes, found: Mapping[str, tuple[int, ...]], source: object) -> None:
    """Raises ValueError unless what was found in `source` is what the rows expect, naming the tensors."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        parts = [
            f"{what} {_listed(names)}" for what, names in (("lacks", missing), ("has unexpected", unexpected)) if names
        ]
        raise ValueError(f"{source} {' and '.join(parts)}; check that its config and its weights belong together")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(found[name])} where its config expects {shape}; "
                "it is a checkpoint of another config"
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def check_tied_head(
    shapes: Mapping[str, tuple[int, ...]], read: Callable[[str, Index], np.ndarray], source: object
) -> None:
    """Raises ValueError unless an output matrix that a checkpoint has is the embedding, as in Gemma 2."""
    if HEAD not in shapes:
        return
    embedding, same = MODEL[0].name, True
    rows = shapes[HEAD][0] if shapes[HEAD] == shapes[embedding] else 0
    for at in range(0, rows, 4096):  # bounded memory, and by bits: bfloat16 compares slowly
        ours, theirs = (read(name, (slice(at, at + 4096), slice(None))) for name in (HEAD, embedding))
        same = same and ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    if not rows or not same:
        raise ValueError(
            f"{source}: {HEAD} is not the embedding, so that the model has an untied head; "
            "Gemma 2's output is its embedding, and this program has no other"
        )


def from_hf(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Our weights by path, of a Hugging Face state dict held in memory. Raises ValueError naming what is wrong."""
    source = "the state dict"
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name != HEAD}
    claim_tensors(their_shapes(MODEL, config), shapes, source)
    check_tied_head(
        {name: tensor.shape for name, tensor in tensors.items()}, lambda name, at: tensors[name][at], source
    )
    size = dims.dim_sizes(config)
    return {
        row.path: row.join(
            size,
            tensors[row.names(config.layers)[0]].dtype,
            lambda name, at: tensors[name][at],
            (slice(None),) * len(row.letters),
        )
        for row in MODEL
    }


def to_hf(weights: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """A Hugging Face state dict, of our weights by path. Raises ValueError naming what is wrong."""
    claim_tensors(our_shapes(MODEL, config), {path: w.shape for path, w in weights.items()}, "the model")
    return {name: tensor for row in MODEL for name, tensor in row.split(np.asarray(weights[row.path]))}
