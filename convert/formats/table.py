"""The one table of names and layouts: our weights, Hugging Face's tensors and, derived from it, PEFT's.

An array is ours, with a path such as blocks/attn/q/w; a tensor is Hugging Face's or PEFT's, with a name. A row reads
left to right on import and right to left on export. Layouts are einops patterns in the letters of `dims`; a row whose
name holds `{L}` is one tensor for each layer and one array stacked on L. Every tensor and every array is claimed by
exactly one row, or it is an error that names it. Values are never changed. Where tensors are stored, in which dtype and
on which device is decided by callers: a tensor is whatever `read` returns.
"""

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from einops import rearrange

from gemma2_jax import dims
from gemma2_jax.convert.files.memory import Index, Shapes, copy_array
from gemma2_jax.model_config import TOKEN_ROWS, AdapterConfig, ModelConfig

PEFT = "base_model.model."  # what PEFT's names of tensors begin with
HEAD = "lm_head.weight"  # Hugging Face's output matrix; no row has it, as Gemma 2's output matrix is the embedding


@dataclass(frozen=True)
class Row:
    """An array and the tensor, or the tensors of all layers, that hold the same values."""

    path: str  # the array's path
    dims: str  # the array's dims: "L D N H"
    name: str  # the tensor's name; {L} stands for the layer
    layout: str  # the tensor's dims, where a group such as (N H) is one dim: "(N H) D"
    rank: int = 0  # the size of R or of E, where it is a row of an adapter

    @property
    def stacked(self) -> bool:
        """Whether the array stacks a tensor of each layer."""
        return "{L}" in self.name

    @property
    def letters(self) -> str:
        """The array's dims as the model spells them: "LDNH"."""
        return self.dims.replace(" ", "")

    @property
    def groups(self) -> list[str]:
        """The letters of each of the tensor's dims: ["NH", "D"]."""
        groups = re.findall(r"\(([A-Z ]+)\)|([A-Z])", self.layout)
        return [(group or letter).replace(" ", "") for group, letter in groups]

    @property
    def layer_dims(self) -> str:
        """The dims of that part of the array which one tensor holds: "D N H"."""
        return self.dims.removeprefix("L ") if self.stacked else self.dims

    def names(self, layers: int) -> list[str]:
        """The names of the tensors, layer 0 first."""
        return [self.name.format(L=layer) for layer in range(layers)] if self.stacked else [self.name]

    def read_array(
        self, dim_sizes: Mapping[str, int], dtype, read: Callable[[str, Index], np.ndarray], index: Index
    ) -> np.ndarray:
        """The slices `index` of the array in `dtype`, of tensors that `read(name, slices)` gives.

        Reads no more of the tensors than that takes. A part of one layer, or of an array that is not stacked, is a view
        of what was read, with the tensor's order in memory.

        Args:
          dim_sizes: the size of each letter in the model.
        """
        spans = {letter: range(dim_sizes[letter])[span] for letter, span in zip(self.letters, index, strict=True)}
        strides = {group[0]: math.prod(dim_sizes[letter] for letter in group[1:]) for group in self.groups}
        slices = tuple(slice(spans[first].start * step, spans[first].stop * step) for first, step in strides.items())
        # Within a group only the first letter can be cut while reading; the others are cut from what was read.
        letters = self.layer_dims.replace(" ", "")
        lengths = {letter: len(spans[letter]) if letter in strides else dim_sizes[letter] for letter in letters}
        cuts = tuple(slice(None) if letter in strides else index[self.letters.index(letter)] for letter in letters)

        def read_layer(name: str) -> np.ndarray:
            return rearrange(read(name, slices), f"{self.layout} -> {self.layer_dims}", **lengths)[cuts]

        if not self.stacked:
            return read_layer(self.name).astype(dtype, copy=False)
        if len(spans["L"]) == 1:  # one layer needs no copy
            return read_layer(self.name.format(L=spans["L"].start))[None].astype(dtype, copy=False)
        array = np.empty([len(span) for span in spans.values()], dtype)
        for position, layer in enumerate(spans["L"]):
            copy_array(array[position], read_layer(self.name.format(L=layer)))
        return array

    def to_tensor(self, array: np.ndarray) -> np.ndarray:
        """The tensor of an array, or of some rows of it, as a view. Of a stacked array it takes one layer without L."""
        return rearrange(array, f"{self.layer_dims} -> {self.layout}")

    def to_tensors(self, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The name and the tensor of every layer of a whole array, as views of it."""
        names = self.names(len(array))
        for name, part in zip(names, array if self.stacked else [array], strict=True):
            yield name, self.to_tensor(part)


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
# The tensors of matrices are [out, in]; an adapter's B has the first of these dims and its A the second.
PROJECTIONS = {
    row.path.split("/", 1)[1].removesuffix("/w"): row for row in MODEL if row.stacked and row.letters != "LD"
}


def adapter_rows(projection: str, rank: int = 0) -> dict[str, Row]:
    """The rows of the adapter of a projection such as "attn/q": of its a, its b and its m, which DoRA alone has."""
    row = PROJECTIONS[projection]
    produced, contracted = row.groups
    path = row.path.removesuffix("w") + "adapter"
    name = PEFT + row.name.removesuffix(".weight")
    out, into = " ".join(produced), " ".join(contracted)
    return {
        "a": Row(f"{path}/a", f"L {into} R", f"{name}.lora_A.weight", f"R ({into})", rank),
        "b": Row(f"{path}/b", f"L R {out}", f"{name}.lora_B.weight", f"({out}) R", rank),
        "m": Row(f"{path}/m", f"L {out}", f"{name}.lora_magnitude_vector", f"({out})"),
    }


def match_targets(adapter: AdapterConfig) -> list[str]:
    """The projections that have an adapter, such as "attn/q", in the order of `PROJECTIONS`."""
    if adapter.kind == "none":
        return []
    return [name for name in PROJECTIONS if any(fnmatch.fnmatch(name, target) for target in adapter.targets)]


def adapted_rows(names: Iterable[str]) -> list[str]:
    """The projections whose adapter is named, by the path of an array or by a tensor's name with {L} for the layer."""
    names = set(names)
    return [
        projection
        for projection in PROJECTIONS
        if any(row.path in names or row.name in names for row in adapter_rows(projection).values())
    ]


# Rows of the embedding that are trained beside adapters, and the embedding that they belong to where it has grown.
_TOKENS = Row(TOKEN_ROWS, "E D", f"{PEFT}model.embed_tokens.token_adapter.trainable_tokens_delta", "E D")
_GROWN = replace(MODEL[0], name=f"{PEFT}model.embed_tokens.token_adapter.base_layer.weight")


def table_rows(adapter: AdapterConfig, layers: int, *, grown: bool = False) -> tuple[Row, ...]:
    """The rows of the adapters of a model of so many layers, and of the weights that are saved with them.

    Those are the weights in place of the model's, and the embedding where trained rows are of tokens that were added
    (`Checkpoint.grown`).
    """
    rows = [
        row
        for projection in match_targets(adapter)
        for part, row in adapter_rows(projection, adapter.stack_rank(projection, layers)).items()
        if part != "m" or adapter.kind == "dora"
    ]
    if adapter.trainable_tokens:
        rows.append(replace(_TOKENS, rank=len(adapter.token_ids)))
    replaced = (replace(row, name=f"{PEFT}{row.name}") for row in MODEL if adapter.replaces(row.path))
    return (*rows, *([_GROWN] if grown else []), *replaced)


def array_shapes(rows: tuple[Row, ...], config: ModelConfig) -> Shapes:
    """The shapes of the arrays of these rows, by path."""
    return {row.path: dims.weight_shape(row.letters, config, row.rank) for row in rows}


def tensor_shapes(rows: tuple[Row, ...], config: ModelConfig) -> Shapes:
    """The shapes of the tensors of these rows, by name."""
    shapes = {row.name: tensor_shape(row, config) for row in rows}
    return {name: shapes[row.name] for row in rows for name in row.names(config.layers)}


def tensor_shape(row: Row, config: ModelConfig) -> tuple[int, ...]:
    """The shape of a row's tensor, which of a stacked row is that of one layer."""
    return tuple(math.prod(dims.weight_shape(group, config, row.rank)) for group in row.groups)


def claim_tensors(expected: Shapes, actual: Mapping[str, tuple[int, ...]], source: object) -> None:
    """Raises ValueError naming tensors (or arrays) that `source` lacks, has besides, or has in another shape."""
    missing = [name for name in expected if name not in actual]
    unexpected = [name for name in actual if name not in expected]
    if missing or unexpected:
        parts = [
            f"{verb} {list_names(names)}"
            for verb, names in (("lacks", missing), ("has unexpected", unexpected))
            if names
        ]
        raise ValueError(f"{source} {' and '.join(parts)}; check that its config and its weights belong together")
    for name, shape in expected.items():
        if tuple(actual[name]) != shape:
            transposed = tuple(actual[name]) == shape[::-1]
            raise ValueError(
                f"{source}: {name} has shape {tuple(actual[name])} where its config expects {shape}; "
                + (
                    "it is stored transposed; store its transpose (tensor.T.contiguous()) in its place"
                    if transposed
                    else "it is a checkpoint of another config"
                )
            )


def list_names(names: list[str]) -> str:
    """The first three names, and how many there are besides."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def check_tied_head(
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str, Index], np.ndarray],
    source: object,
    remedy: str = "",
) -> None:
    """Raises ValueError where a checkpoint has an output matrix [V, D] with other values than the embedding.

    Args:
      remedy: the end of the sentence, on what can be done.
    """
    if HEAD not in shapes:
        return
    embedding, rows = MODEL[0].name, shapes[HEAD][0] if shapes[HEAD] else 0
    reason = f"has shape {shapes[HEAD]} where the embedding has {shapes[embedding]}"
    if shapes[HEAD] == shapes[embedding]:
        different = sum(
            _count_unequal_rows(*(read(name, (slice(row, row + 4096), slice(None))) for name in (HEAD, embedding)))
            for row in range(0, rows, 4096)  # bounds memory
        )
        if not different:
            return
        reason = f"differs from the embedding in {different} of {rows} rows"
    raise ValueError(
        f"{source}: {HEAD} is not the embedding (it {reason}), so that the model has an untied head; "
        f"Gemma 2's output is its embedding, and this program has no other{remedy}"
    )


def _count_unequal_rows(left_VD: np.ndarray, right_VD: np.ndarray) -> int:
    """The rows whose values differ; one matrix may be float32 and the other 16 bits."""
    if left_VD.dtype != right_VD.dtype:
        left_VD, right_VD = left_VD.astype(np.float32), right_VD.astype(np.float32)
    bits = np.dtype(f"u{left_VD.itemsize}")  # bfloat16 is slow to compare, and NaN differs from itself
    return int((left_VD.view(bits) != right_VD.view(bits)).any(axis=1).sum())


def from_hf(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """The arrays by path, of a Hugging Face state dict in memory. Raises ValueError naming a tensor that is wrong."""
    source = "the state dict"
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name != HEAD}
    claim_tensors(tensor_shapes(MODEL, config), shapes, source)
    check_tied_head(
        {name: tensor.shape for name, tensor in tensors.items()}, lambda name, index: tensors[name][index], source
    )
    dim_sizes = dims.dim_sizes(config)
    return {
        row.path: row.read_array(
            dim_sizes,
            tensors[row.names(config.layers)[0]].dtype,
            lambda name, index: tensors[name][index],
            (slice(None),) * len(row.letters),
        )
        for row in MODEL
    }


def to_hf(weights: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """A Hugging Face state dict, of arrays by path. Raises ValueError naming an array that is wrong."""
    claim_tensors(array_shapes(MODEL, config), {path: w.shape for path, w in weights.items()}, "the model")
    return {name: tensor for row in MODEL for name, tensor in row.to_tensors(np.asarray(weights[row.path]))}
