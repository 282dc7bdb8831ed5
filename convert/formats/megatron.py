"""Megatron's tensors of Gemma 2 as Hugging Face's and PEFT's tensors, both ways; `table` has these as our arrays.

Megatron fuses q, k and v into one matrix and gate and up into another. A `torch_dist` checkpoint stacks the layers, or
has a tensor for each layer. Megatron's legacy format, `torch`, has a file for each rank, with that rank's share of each
tensor. Projections that are fused share one A of an adapter. The rows of a fused tensor are groups of equal size, and
each of its parts has the same rows of every group. `files.torch_dist` and `files.torch_files` read and write the files;
`megatron_config` has the configs.
"""

import itertools
import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gemma2_jax.config import AdapterConfig, ModelConfig
from gemma2_jax.convert.files import torch_files
from gemma2_jax.convert.files.memory import Index, Shapes, reuse_memory
from gemma2_jax.convert.files.pickles import Record
from gemma2_jax.convert.files.safetensors import read_json
from gemma2_jax.convert.files.tensors import Tensor, Tensors
from gemma2_jax.convert.files.torch_dist import METADATA, TorchDist
from gemma2_jax.convert.formats import table

TRACKER = "latest_checkpointed_iteration.txt"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    # From Megatron-Core 0.19 on the common state is in the checkpoint itself; all versions read it from common.pt.
    "common_backend": "torch",
    "common_backend_version": 1,
}
BACKEND_FILE = "metadata.json"
RANK_FILE = "model_optim_rng.pt"
_MOST_TENSORS = 200_000  # counting each layer's tensors; a 27B model with LoRA has 1,000

Rows = Literal["one", "heads", "halves", "shared"]


@dataclass(frozen=True)
class Fused:
    """A tensor of Megatron's and the tensors of Hugging Face's or PEFT's that are fused into it."""

    name: str  # Megatron's name; {L} stands for the layer
    parts: tuple[str, ...]  # Hugging Face's or PEFT's names
    # The order of the parts' rows: of "one" part; by kv "heads", each with its q, k and v; in "halves", one after the
    # other; "shared" by all parts, each of which is the tensor itself.
    rows: Rows = "one"
    rank_dim: Literal[0, 1, None] = None  # the dim that is divided among tensor-parallel ranks
    rank_halves: bool = False  # whether a tensor of all ranks has the halves of one rank after those of another

    @property
    def stacked(self) -> bool:
        """Whether there is such a tensor for each layer."""
        return "{L}" in self.name

    @property
    def key(self) -> str:
        """The name that torch_dist has for the stack of all layers."""
        return self.name.replace(".{L}", "")

    def row_groups(self, sizes: list[int], kv_heads: int, ranks: int) -> tuple[int, list[tuple[int, int]]]:
        """The number of groups of rows, and the first row and the end of each part within every group.

        Args:
          sizes: the rows of each part in all groups.
          ranks: tensor-parallel ranks whose shares of the rows follow one another, each with its own halves.
        """
        groups = {"heads": kv_heads, "halves": ranks}.get(self.rows, 1)
        ends = list(itertools.accumulate(size // groups for size in sizes))
        return groups, [(end - size // groups, end) for end, size in zip(ends, sizes, strict=True)]

    def fuse(self, parts: list[np.ndarray], kv_heads: int) -> np.ndarray:
        """The fused tensor of whole parts, or of one rank's share of each, which then has `kv_heads` heads."""
        if len(parts) == 1 or self.rows == "shared":
            return parts[0]
        sizes = [len(part) for part in parts]
        groups, spans = self.row_groups(sizes, kv_heads, 1)
        inner = parts[0].shape[1:]
        fused = reuse_memory((sum(sizes), *inner), parts[0].dtype)
        for part, (start, stop) in zip(parts, spans, strict=True):
            fused.reshape(groups, -1, *inner)[:, start:stop] = part.reshape(groups, stop - start, *inner)
        return fused


_L = "decoder.layers.{L}"
_H = "model.layers.{L}"
MODEL = (
    Fused("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), rank_dim=0),
    Fused(f"{_L}.self_attention.linear_qkv.layer_norm_weight", (f"{_H}.input_layernorm.weight",)),
    Fused(
        f"{_L}.self_attention.linear_qkv.weight",
        tuple(f"{_H}.self_attn.{x}_proj.weight" for x in "qkv"),
        rows="heads",
        rank_dim=0,
    ),
    Fused(f"{_L}.self_attention.linear_proj.weight", (f"{_H}.self_attn.o_proj.weight",), rank_dim=1),
    Fused(
        f"{_L}.self_attention.linear_proj.post_layernorm.weight",
        (f"{_H}.post_attention_layernorm.weight",),
    ),
    Fused(f"{_L}.mlp.linear_fc1.layer_norm_weight", (f"{_H}.pre_feedforward_layernorm.weight",)),
    Fused(
        f"{_L}.mlp.linear_fc1.weight",
        tuple(f"{_H}.mlp.{x}_proj.weight" for x in ("gate", "up")),
        rows="halves",
        rank_dim=0,
    ),
    Fused(f"{_L}.mlp.linear_fc2.weight", (f"{_H}.mlp.down_proj.weight",), rank_dim=1),
    Fused(f"{_L}.mlp.linear_fc2.post_layernorm.weight", (f"{_H}.post_feedforward_layernorm.weight",)),
    Fused("decoder.final_layernorm.weight", ("model.norm.weight",)),
)
# The last pipeline stage has a copy of the embedding, which is the output matrix too.
_HEAD = Fused("output_layer.weight", (table.HEAD,), rank_dim=0)
# TransformerEngine keeps state for FP8 of each of these modules. Megatron-Bridge loads no checkpoint without it.
_EXTRA_STATES = [
    f"{_L}.{module}._extra_state"
    for module in (
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "self_attention.linear_proj.post_layernorm",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
        "mlp.linear_fc2.post_layernorm",
    )
] + ["decoder.final_layernorm._extra_state"]
_NO_STATE = np.empty(0, np.uint8)
# For each fused module its projections, each with its name in a canonical adapter, and the rows of its matrix.
_MODULES: dict[str, tuple[dict[str, str], Rows]] = {
    f"{_L}.self_attention.linear_qkv": ({"attn/q": "q", "attn/k": "k", "attn/v": "v"}, "heads"),
    f"{_L}.self_attention.linear_proj": ({"attn/o": ""}, "one"),
    f"{_L}.mlp.linear_fc1": ({"mlp/gate": "gate", "mlp/up": "up"}, "halves"),
    f"{_L}.mlp.linear_fc2": ({"mlp/down": ""}, "one"),
}
# Names that begin like this are no weights of the model, and are not read.
_STATE_PREFIXES = (
    "optimizer.",
    "rng_state",
    "common_state",
    "rerun_state_machine_state",
    "opt_param_scheduler",
    "param_groups",
)


@dataclass(frozen=True, eq=False)
class _StoredTensor:
    """A tensor of a torch_dist checkpoint, or one layer of a stack."""

    store: TorchDist
    name: str
    layer: int | None  # None: the whole tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.store.shapes[self.name][0 if self.layer is None else 1 :]

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtypes[self.name]

    def read(self, index: Index) -> np.ndarray:
        if self.layer is None:
            return self.store.read(self.name, index)
        return self.store.read(self.name, (slice(self.layer, self.layer + 1), *index))[0]


@dataclass(frozen=True, eq=False)
class _ConcatenatedTensor:
    """The shares that ranks have of a tensor, concatenated along a dim."""

    parts: tuple[Tensor, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def read(self, index: Index) -> np.ndarray:
        span, pieces, offset = range(self.shape[self.dim])[index[self.dim]], [], 0
        for part in self.parts:
            size = part.shape[self.dim]
            start, stop = max(span.start - offset, 0), min(span.stop - offset, size)
            if start < stop:
                pieces.append(part.read((*index[: self.dim], slice(start, stop), *index[self.dim + 1 :])))
            offset += size
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, self.dim)


@dataclass(frozen=True, eq=False)
class _FusedPart:
    """A part of a fused tensor: the rows from `start` to `stop` of each of its groups."""

    fused: Tensor
    groups: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.groups * (self.stop - self.start), *self.fused.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.fused.dtype

    def read(self, index: Index) -> np.ndarray:
        span, size = range(self.shape[0])[index[0]], self.stop - self.start
        if self.groups == 1:
            return self.fused.read((slice(self.start + span.start, self.start + span.stop), *index[1:]))
        first, last = span.start // size, -(-span.stop // size)
        width = self.fused.shape[0] // self.groups
        groups = self.fused.read((slice(first * width, last * width), *index[1:]))
        rows = groups.reshape(last - first, width, *groups.shape[1:])[:, self.start : self.stop]
        return rows.reshape(-1, *groups.shape[1:])[span.start - first * size : span.stop - first * size]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The tensors of a Megatron checkpoint, by Megatron's names with one for each layer, and its other facts."""

    folder: Path  # the folder of the iteration
    layout: str  # "torch_dist", or "legacy torch" with the ranks that wrote it
    iteration: int | None
    tensors: dict[str, Tensor]
    ignored: tuple[str, ...]  # the kinds of state that are no weights of the model
    args: dict[str, Any] | None  # Megatron-LM's arguments
    ranks: int = 1  # tensor-parallel ranks whose shares of fused rows follow one another


def iteration_folder(folder: Path) -> Path | None:
    """The folder of the iteration that a Megatron checkpoint's folder names, or `folder` if it is an iteration's.

    None where it is neither. Raises ValueError where the iteration that is named is missing.
    """
    tracker = folder / TRACKER
    if tracker.is_file():
        with tracker.open("rb") as file:
            text = file.read(100).decode(errors="replace").strip()
        if text != "release" and not re.fullmatch("[0-9]{1,12}", text):
            raise ValueError(f"{tracker} says {text[:40]!r}; it must name an iteration, as 1000 or release")
        iteration = folder / (text if text == "release" else f"iter_{int(text):07}")
        if not iteration.is_dir():
            raise ValueError(
                f"{tracker} names iteration {text}, and there is no {iteration}; copy it, or name another one"
            )
        return iteration
    is_iteration = (folder / METADATA).is_file() or (folder / BACKEND_FILE).is_file() or any(folder.glob("mp_rank_*"))
    return folder if is_iteration else None


def open_folder(folder: Path) -> Opened:
    """Reads the metadata of an iteration's folder. Raises ValueError where it is damaged, or of another format."""
    legacy = not (folder / METADATA).is_file() and any(folder.glob("mp_rank_*"))
    return _open_legacy(folder) if legacy else _open_torch_dist(folder)


def _open_torch_dist(folder: Path) -> Opened:
    backend_path = folder / BACKEND_FILE
    if not backend_path.exists():
        raise ValueError(
            f"{backend_path} is missing: this is a part of a checkpoint, or one of fsdp_dtensor, which this program "
            "does not read; copy the whole, or save it with --ckpt-format torch_dist"
        )
    backend = read_json(backend_path).get("sharded_backend")
    if backend != "torch_dist":
        raise ValueError(
            f"{backend_path} says that sharded_backend is {reprlib.repr(backend)}; this program reads 'torch_dist'"
        )
    store = TorchDist(folder)
    tensors, ignored = _model_state(folder, store)
    common = _common_state(folder, store)
    return Opened(
        folder=folder,
        layout="torch_dist",
        iteration=_int_or_none(common.get("iteration")),
        tensors=tensors,
        ignored=tuple(f"{kind} ({count})" for kind, count in sorted(ignored.items()) if kind != "common_state"),
        args=_namespace_values(common.get("args")),
    )


def _model_state(folder: Path, store: TorchDist) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors of the model, with one for each layer, and the number of other entries of each kind."""
    tensors, ignored, prefix = dict[str, Tensor](), dict[str, int](), _wrapper_prefix(store.shapes)
    for name, shape in store.shapes.items():
        if name.startswith(_STATE_PREFIXES):
            kind = name.split(".")[0]
            ignored[kind] = ignored.get(kind, 0) + 1
            continue
        if "._extra_state" in name:  # torch itself may flatten extra state into tensors
            continue
        model_name = name.removeprefix(prefix)
        if ".layers." in name and not re.search(r"\.layers\.\d+\.", name) and shape:
            if len(tensors) + shape[0] > _MOST_TENSORS:
                raise ValueError(f"{folder} says that {name[:200]} has {shape[0]} layers, which no model has")
            for layer in range(shape[0]):
                tensors[model_name.replace(".layers.", f".layers.{layer}.", 1)] = _StoredTensor(store, name, layer)
        else:
            tensors[model_name] = _StoredTensor(store, name, None)
    for name in store.objects:
        if not name.removeprefix(prefix).split("/")[0].endswith("_extra_state"):
            kind = name.split("/")[0].split(".")[0]
            ignored[kind] = ignored.get(kind, 0) + 1
    for name in [name for name in tensors if name.endswith(".weight_w")]:  # weight_w is gate and weight_v is up
        stem = name.removesuffix("_w")
        if f"{stem}_v" in tensors:
            tensors[stem] = _ConcatenatedTensor((tensors.pop(name), tensors.pop(f"{stem}_v")), 0)
    return tensors, ignored


def _wrapper_prefix(names: Iterable[str]) -> str:
    """The prefix that Megatron's wrappers put before every name: nothing, or model. and module. a few times."""
    for name in names:
        match = re.match(r"((?:model\.|module\.)+)(?:embedding|decoder)\.", name)
        if match:
            return match[1]
    return ""


def _common_state(folder: Path, store: TorchDist) -> dict[str, Any]:
    if (folder / "common.pt").is_file():
        content = torch_files.load_torch(folder / "common.pt")
    else:
        names = [name for name in store.objects if name.startswith("common_state/")]
        content = store.object(names[0]) if names else {}
        content = content[0] if isinstance(content, list) and content else content
    if not isinstance(content, dict):
        raise ValueError(f"{folder}: its common state is no dictionary; copy the checkpoint again")
    return content


def _int_or_none(x: Any) -> int | None:
    return x if type(x) is int else None


def _namespace_values(args: Any) -> dict[str, Any] | None:
    return args.state if isinstance(args, Record) and isinstance(args.state, dict) else None


def _open_legacy(folder: Path) -> Opened:
    paths = _rank_paths(folder)
    content = {rank: _load_rank(path) for rank, path in paths.items()}
    args = _namespace_values(next(iter(content.values())).get("args")) or {}
    ranks, stages = (
        max(_int_or_none(args.get(f"{kind}_model_parallel_size")) or 1, *(1 + rank[axis] for rank in paths))
        for axis, kind in enumerate(("tensor", "pipeline"))
    )
    if len(paths) != ranks * stages:
        every_rank = (divmod(number, stages) for number in range(ranks * stages))
        rank, stage = next(rank for rank in every_rank if rank not in paths)
        raise ValueError(f"{folder} lacks the file of tensor-parallel rank {rank}, stage {stage}; copy it too")
    chunks = _virtual_stages(content[0, 0])
    tensors, first_layer = dict[str, Tensor](), 0
    for chunk, stage in itertools.product(chunks, range(stages)):
        shares = [_chunk_state(content[rank, stage], chunk, paths[rank, stage]) for rank in range(ranks)]
        layers = set()
        for name in dict.fromkeys(itertools.chain(*shares)):
            layer = re.match(r"decoder\.layers\.(\d{1,4})\.", name)
            model_name = name
            if layer:
                layers.add(int(layer[1]))
                model_name = name.replace(f".{layer[1]}.", f".{first_layer + int(layer[1])}.", 1)
            if not name.endswith("_extra_state"):
                tensors[model_name] = _combine_shares(name, shares, folder)
        first_layer += 1 + max(layers, default=-1)
    keys = {key for rank in content.values() for key in rank}
    ignored = keys - {"args", "checkpoint_version", "iteration", "num_floating_point_operations_so_far", *chunks}
    return Opened(
        folder=folder,
        layout=f"legacy torch at TP {ranks} and PP {stages}",
        iteration=_int_or_none(content[0, 0].get("iteration")),
        tensors=tensors,
        ignored=tuple(sorted(str(key)[:100] for key in ignored)),
        args=args or None,
        ranks=ranks,
    )


def _rank_paths(folder: Path) -> dict[tuple[int, int], Path]:
    """The file of each tensor-parallel rank and pipeline stage that has a folder."""
    paths = {}
    for rank_folder in sorted(folder.glob("mp_rank_*")):
        number = re.fullmatch(r"mp_rank_(\d{2,4})(?:_(\d{3,4}))?", rank_folder.name)
        if not number:
            raise ValueError(
                f"{rank_folder} is no rank's folder that this program reads, as mp_rank_00 and mp_rank_00_000 are"
            )
        path = paths.setdefault((int(number[1]), int(number[2] or 0)), rank_folder / RANK_FILE)
        if path.parent != rank_folder:
            raise ValueError(
                f"{path.parent} and {rank_folder} are of one rank at two layouts; delete those of the older one"
            )
    return paths


def _load_rank(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy it, or the whole checkpoint, again")
    content = torch_files.load_torch(path)
    if not isinstance(content, dict) or not _virtual_stages(content):
        raise ValueError(f"{path} holds no model; copy it again")
    version = content.get("checkpoint_version")
    if not isinstance(version, int | float) or version < 2:
        raise ValueError(f"{path}: checkpoint_version is {version!r}; before 2.0 q, k and v had another order")
    return content


def _virtual_stages(content: dict[str, Any]) -> list[str]:
    """The keys of the model's parts in a rank's file: one part, or several in order with an interleaved schedule."""
    numbered = [name for name in content if isinstance(name, str) and re.fullmatch(r"model\d{1,3}", name)]
    return ["model"] if "model" in content else sorted(numbered, key=lambda name: int(name[5:]))


def _chunk_state(content: dict[str, Any], chunk: str, path: Path) -> dict[str, Any]:
    state = content.get(chunk)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} holds no {chunk}; copy it again")
    return state


def _combine_shares(name: str, shares: list[dict[str, Any]], folder: Path) -> Tensor:
    """The whole tensor of what each tensor-parallel rank has of it."""
    parts = tuple(share.get(name) for share in shares)
    if not all(isinstance(part, torch_files.Stored) for part in parts):
        raise ValueError(f"{folder}: {name} is not a tensor of every tensor-parallel rank; copy the checkpoint again")
    stored: Any = parts
    if len({(part.shape, part.dtype) for part in stored}) > 1:
        raise ValueError(
            f"{folder}: ranks have {name} in different shapes or dtypes; they are of different checkpoints"
        )
    split = next((fused.rank_dim for fused in (*MODEL, _HEAD) if fused.name == _without_layer(name)), None)
    if split is not None and len(stored[0].shape) > split:
        return _ConcatenatedTensor(stored, split)
    if any(part.read().tobytes() != stored[0].read().tobytes() for part in stored[1:]):
        raise ValueError(f"{folder}: ranks have different {name}, of which each has all; they are of different steps")
    return stored[0]


def _without_layer(name: str) -> str:
    """A tensor's name with {L} in place of its layer."""
    return re.sub(r"(?<=\.layers\.)\d+(?=\.)", "{L}", name)


def model_tensors(opened: Opened, model: ModelConfig) -> Tensors:
    """The weights by Hugging Face's names.

    Raises ValueError naming a tensor that is missing, unknown or of another shape than the config says.
    """
    shapes = table.tensor_shapes(table.MODEL, model)
    shapes |= {table.HEAD: shapes[table.MODEL[0].name]}
    head = (_HEAD,) if _HEAD.name in opened.tensors else ()
    return _split_fused(opened, (*MODEL, *head), shapes, model)


def adapter_fusings(opened: Opened) -> tuple[tuple[Fused, ...], list[str]]:
    """The fused tensors of this checkpoint's adapters, and the projections that have an adapter."""
    names = {_without_layer(name) for name in opened.tensors}
    dora = any(name.endswith("weight_magnitude") for name in names)
    fusings, projections = list[Fused](), list[str]()
    for module, (parts, _) in _MODULES.items():
        if f"{module}.adapter.linear_in.weight" in names:
            fusings += fuse_adapter(module, list(parts), dora=dora, canonical=False)
            projections += parts
        canonical = [
            projection
            for projection, name in parts.items()
            if f"{module}.adapter.adapter_{name}.linear_in.weight" in names
        ]
        if canonical:
            fusings += fuse_adapter(module, canonical, dora=False, canonical=True)
            projections += canonical
    return tuple(fusings), projections


def is_adapter(opened: Opened) -> bool:
    """Whether a checkpoint holds adapters alone."""
    return bool(opened.tensors) and all(".adapter." in name for name in opened.tensors)


def adapter_tensors(opened: Opened, fusings: tuple[Fused, ...], adapter: AdapterConfig, model: ModelConfig) -> Tensors:
    """The adapter's tensors by PEFT's names. Raises ValueError as `model_tensors` does."""
    return _split_fused(opened, fusings, table.tensor_shapes(table.table_rows(adapter), model, adapter.rank), model)


def fuse_adapter(module: str, projections: list[str], *, dora: bool, canonical: bool) -> list[Fused]:
    """The tensors of a module's adapter. In a canonical adapter each projection has an A of its own."""
    canonical_names, rows = _MODULES[module]
    adapter_rows = {projection: table.adapter_rows(projection) for projection in projections}
    if canonical and any(canonical_names.values()):
        return [
            Fused(f"{module}.adapter.adapter_{canonical_names[projection]}.{end}.weight", (row[variable].name,))
            for projection, row in adapter_rows.items()
            for end, variable in (("linear_in", "a"), ("linear_out", "b"))
        ]
    names = {variable: tuple(row[variable].name for row in adapter_rows.values()) for variable in "abm"}
    fusings = [
        Fused(f"{module}.adapter.linear_in.weight", names["a"], rows="shared"),
        Fused(f"{module}.adapter.linear_out.weight", names["b"], rows=rows),
    ]
    # Megatron-Core reorders the halves of matrices alone, so that a vector keeps the order of the ranks that saved it.
    return fusings + [Fused(f"{module}.adapter.weight_magnitude", names["m"], rows=rows, rank_halves=True)] * dora


def _split_fused(opened: Opened, fusings: tuple[Fused, ...], shapes: Shapes, model: ModelConfig) -> Tensors:
    """The parts of fused tensors by Hugging Face's or PEFT's names, whose shapes are `shapes`."""
    expected, tensors = Shapes(), dict[str, Tensor]()
    for fused, layer in ((f, n) for f in fusings for n in (range(model.layers) if f.stacked else (0,))):
        name, parts = fused.name.format(L=layer), [part.format(L=layer) for part in fused.parts]
        sizes = [shapes[part][0] for part in parts]
        rows = sizes[0] if fused.rows == "shared" else sum(sizes)
        tensor = opened.tensors.get(name)
        # The vocabulary may be padded to a multiple of 128 for each rank.
        shape = tensor is not None and fused.parts[0] in (table.MODEL[0].name, table.HEAD) and tensor.shape
        if shape and rows < shape[0] and shape[0] % 128 == 0:
            rows = shape[0]
        expected[name] = (rows, *shapes[parts[0]][1:])
        if tensor is None:
            continue
        if fused.rows == "shared":
            tensors |= dict.fromkeys(parts, tensor)
            continue
        # A whole tensor has all of gate before all of up; concatenated shares of ranks alternate between the two.
        ranks = opened.ranks if fused.rank_halves or opened.layout != "torch_dist" else 1
        groups, spans = fused.row_groups(sizes, model.kv_heads, ranks)
        for part, (start, stop) in zip(parts, spans, strict=True):
            tensors[part] = tensor if (start, stop) == (0, rows) else _FusedPart(tensor, groups, start, stop)
    table.claim_tensors(expected, {name: tensor.shape for name, tensor in opened.tensors.items()}, opened.folder)
    return Tensors(tensors)


def written_adapter(adapter: AdapterConfig, *, canonical: bool) -> tuple[Fused, ...]:
    """The fused tensors of a checkpoint that is written of an adapter."""
    targets, dora = table.match_targets(adapter), adapter.kind == "dora"
    modules = {module: [name for name in parts if name in targets] for module, (parts, _) in _MODULES.items()}
    fusings = (
        fuse_adapter(module, names, dora=dora, canonical=canonical) for module, names in modules.items() if names
    )
    return tuple(itertools.chain.from_iterable(fusings))


def shared_tensors(adapter: AdapterConfig) -> list[list[str]]:
    """Groups of projections that share one A in a fused adapter, which then must have all projections of a group."""
    targets = table.match_targets(adapter)
    return [list(parts) for parts, _ in _MODULES.values() if len(parts) > 1 and not set(targets).isdisjoint(parts)]


def rank_tensors(model: ModelConfig, stages: int, stage: int) -> Iterator[tuple[Fused, int, str]]:
    """The weights of a pipeline stage: each with its layer and its name in the stage, which counts layers from 0."""
    depth = model.layers // stages
    for fused in MODEL:
        for layer in range(depth) if fused.stacked else (0,):
            first, last = fused is MODEL[0] and stage == 0, fused is MODEL[-1] and stage == stages - 1
            if fused.stacked or first or last:
                yield fused, stage * depth + layer if fused.stacked else 0, fused.name.format(L=layer)
    if stage and stage == stages - 1:
        yield MODEL[0], 0, _HEAD.name


def rank_extra_states(model: ModelConfig, stages: int, stage: int) -> Iterator[tuple[str, Any]]:
    """The state for FP8 in the file of a rank, by name."""
    for name in _EXTRA_STATES:
        if "{L}" in name:
            yield from ((name.format(L=layer), _NO_STATE) for layer in range(model.layers // stages))
        elif stage == stages - 1:
            yield name, _NO_STATE
    if stage == stages - 1:
        yield "output_layer._extra_state", None  # Megatron-Core's own modules have none


def extra_states(layers: int, adapter: Iterable[Fused] = ()) -> Iterator[tuple[str, Any]]:
    """The objects, with their content, that Megatron-Bridge expects beside the weights or beside an adapter's."""
    matrices = [f.name.removesuffix("weight") + "_extra_state" for f in adapter if f.name.endswith(".weight")]
    for name in matrices or _EXTRA_STATES:
        key = name.replace(".{L}", "")
        shards = [f"{layer}_{layers}" for layer in range(layers)] if "{L}" in name else ["0_1"]
        for shard in shards:
            yield f"{key}/shard_{shard}", [None if matrices else _NO_STATE]
