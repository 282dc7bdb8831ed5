"""The tree of weights of google-deepmind/gemma, which is how Kaggle has Gemma 2 for Flax, as tensors for our rows.

It is an Orbax checkpoint with neither a config nor, on Kaggle, dicts in dicts: the name of a dict there is a path such
as "transformer/layer_0/attn/q_einsum", and Orbax's dict below it holds "w". Norms are stored as Hugging Face stores
them, without the 1 that is added to them; queries without their scale; and the embedding without its factor. Keys and
values are one array, and so are gate and up, whose matrices 2B has as [D, F], 9B and 27B as [F, D]. See
gemma/gm/nn/_modules.py, _layers.py and gemma/gm/ckpts/_compat.py of that repository.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gemma2_jax.convert.files import orbax
from gemma2_jax.convert.files.memory import Index, Shapes
from gemma2_jax.convert.files.tensors import Tensor, Tensors
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.formats.table import Row
from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_9B, GEMMA2_27B, ModelConfig

_PREFIXES = ("transformer/", "params/", "")  # Kaggle's, that of a trainer's state, and that of bare parameters
_PADDING = 128  # rows that the embedding may have after those of the vocabulary
_EMBEDDING = "embedder/input_embedding"
_GATINGS = ("D F", "F D")  # the layouts of gate and of up
_IS_QUERY = re.compile(r"(?:transformer/|params/)?layer_0/attn/q_einsum/w").fullmatch


def _rows(gating: str) -> tuple[Row, ...]:
    """The rows; `gating` is the layout of gate and of up."""
    layer = "layer_{L}"
    return (
        Row("embedding", "V D", _EMBEDDING, "V D"),
        Row("blocks/pre_attn_norm/w", "L D", f"{layer}/pre_attention_norm/scale", "D"),
        Row("blocks/attn/q/w", "L D N H", f"{layer}/attn/q_einsum/w", "N D H"),
        Row("blocks/attn/k/w", "L D K H", f"{layer}/attn/kv_einsum/w/0", "K D H"),
        Row("blocks/attn/v/w", "L D K H", f"{layer}/attn/kv_einsum/w/1", "K D H"),
        Row("blocks/attn/o/w", "L N H D", f"{layer}/attn/attn_vec_einsum/w", "N H D"),
        Row("blocks/post_attn_norm/w", "L D", f"{layer}/post_attention_norm/scale", "D"),
        Row("blocks/pre_mlp_norm/w", "L D", f"{layer}/pre_ffw_norm/scale", "D"),
        Row("blocks/mlp/gate/w", "L D F", f"{layer}/mlp/gating_einsum/0", gating),
        Row("blocks/mlp/up/w", "L D F", f"{layer}/mlp/gating_einsum/1", gating),
        Row("blocks/mlp/down/w", "L F D", f"{layer}/mlp/linear", "F D"),
        Row("blocks/post_mlp_norm/w", "L D", f"{layer}/post_ffw_norm/scale", "D"),
        Row("final_norm/w", "D", "final_norm/scale", "D"),
    )


@dataclass(frozen=True, eq=False)
class _Array:
    """An array of the checkpoint, or one of the two that are stacked in it, with `rows` rows."""

    reader: orbax.Reader
    path: str
    half: int | None = None
    rows: int | None = None  # None: all

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.reader.shapes[self.path].shape[0 if self.half is None else 1 :]
        return shape if self.rows is None else (self.rows, *shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.reader.shapes[self.path].dtype

    def read(self, index: Index) -> np.ndarray:
        spans = tuple(range(size)[span] for size, span in zip(self.shape, index, strict=True))
        index = tuple(slice(span.start, span.stop) for span in spans)
        if self.half is None:
            return self.reader.read(self.path, index)
        return self.reader.read(self.path, (slice(self.half, self.half + 1), *index))[0]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a tree holds."""

    model: ModelConfig
    rows: tuple[Row, ...]
    tensors: Tensors
    notes: tuple[str, ...]


def find_root(folder: Path) -> Path | None:
    """The folder with the tree, which is `folder` or, as on Kaggle, the one folder with a checkpoint in it."""
    roots = orbax.find_roots(folder, depth=1)
    return roots[0] if len(roots) == 1 and any(map(_IS_QUERY, orbax.list_paths(roots[0]))) else None


def open_tree(root: Path, model: ModelConfig | None) -> Opened:
    """The tensors of a tree, and its config, which is `model` or that of Gemma 2 2B, 9B or 27B with its shapes.

    Raises ValueError where the tree is damaged, or no size has its shapes and there is no `model`.
    """
    reader = orbax.Reader(root)
    prefix = next(prefix for prefix in _PREFIXES if any(path.startswith(f"{prefix}layer_0/") for path in reader.shapes))
    tensors = dict[str, Tensor]()
    for path, stored in reader.shapes.items():
        name = re.sub(r"(/mlp/(?:gating_einsum|linear))/w$", r"\1", path.removeprefix(prefix))
        halves = (0, 1) if name.endswith(("/kv_einsum/w", "/gating_einsum")) and stored.shape[:1] == (2,) else (None,)
        for half in halves:
            part = name if half is None else f"{name}/{half}"
            if part in tensors:
                raise ValueError(f"{root} holds {part} twice, under two names; delete one")
            tensors[part] = _Array(reader, path, half)
    model = model or _find_size({name: tensor.shape for name, tensor in tensors.items()})
    if model is None:
        raise ValueError(
            f"{root} has the layout of google-deepmind/gemma and the shapes of neither Gemma 2 2B, 9B nor 27B; give "
            "--hf-config, a folder with its config.json or its Hub id"
        )
    notes = ()
    embedding = tensors.get(_EMBEDDING)
    extra = embedding.shape[0] - model.vocab_size if isinstance(embedding, _Array) and embedding.shape else 0
    if isinstance(embedding, _Array) and 0 < extra <= _PADDING:
        tensors[_EMBEDDING] = replace(embedding, rows=model.vocab_size)
        notes = (f"the last {extra} rows of its embedding pad a vocabulary of {model.vocab_size:,}, and are left out",)
    rows = _choose_rows({name: tensor.shape for name, tensor in tensors.items()}, model, root)
    return Opened(model=model, rows=rows, tensors=Tensors(tensors), notes=notes)


def _find_size(shapes: Shapes) -> ModelConfig | None:
    """The size of Gemma 2 that has these shapes, with any padding of the vocabulary."""
    for size in (GEMMA2_2B, GEMMA2_9B, GEMMA2_27B):
        for rows in map(_rows, _GATINGS):
            expected = table.tensor_shapes(rows, size)
            padding = shapes.get(_EMBEDDING, (0,))[0] - size.vocab_size
            if 0 <= padding <= _PADDING and {**shapes, _EMBEDDING: expected[_EMBEDDING]} == expected:
                return size
    return None


def _choose_rows(shapes: Shapes, model: ModelConfig, root: Path) -> tuple[Row, ...]:
    """The rows with the layout that gate and up have here."""
    if model.width == model.mlp_width:
        raise ValueError(f"{root}: which dim of mlp/gating_einsum is which is not known, as both are {model.width}")
    transposed = shapes.get("layer_0/mlp/gating_einsum/0") == (model.mlp_width, model.width)
    return _rows("F D" if transposed else "D F")
