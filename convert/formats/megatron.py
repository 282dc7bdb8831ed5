"""Megatron's tensors of Gemma 2 as Hugging Face's and PEFT's, both ways; `table` then has what they are here.

Megatron fuses q, k and v into one matrix and gate and up into another. A `torch_dist` checkpoint stacks the layers, or
has a tensor a layer; its legacy format, `torch`, has a file a rank, with that rank's part of each tensor. Adapters have
one A for what is fused. What is fused is a tensor whose rows are equal groups, of each of which a part takes the same
rows. The files themselves are `torch_dist`'s and `torch_files`', their configs `megatron_config`'s.
"""

import itertools
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from gemma2_jax.config import AdapterConfig, ModelConfig
from gemma2_jax.convert.files import torch_files
from gemma2_jax.convert.files.memory import Index, Shapes, reuse_memory
from gemma2_jax.convert.files.pickles import Record
from gemma2_jax.convert.files.safetensors import read_json
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
_MOST_TENSORS = 200_000  # of a layer each; a 27B model with LoRA has 1,000


Rows = Literal["one", "heads", "halves", "shared"]


@dataclass(frozen=True)
class Fused:
    """A tensor of Megatron's and the tensors whose rows it has."""

    name: str  # {L} stands for the layer
    parts: tuple[str, ...]  # Hugging Face's or PEFT's names
    rows: Rows = "one"  # "shared": every part is the tensor itself
    split: Literal[0, 1, None] = None  # the dim that tensor-parallel ranks share
    gathered: bool = False  # halves that ranks have side by side, also where other tensors are put together

    @property
    def stacked(self) -> bool:
        """Whether there is one a layer."""
        return "{L}" in self.name

    @property
    def key(self) -> str:
        """What torch_dist calls the stack."""
        return self.name.replace(".{L}", "")

    def groups(self, sizes: list[int], kv_heads: int, tensor: int) -> tuple[int, list[tuple[int, int]]]:
        """The number of groups of rows, and of each group the rows of each part, whose rows are `sizes`.

        Args:
          tensor: ranks whose shares of the rows follow one another, each with its own halves.
        """
        groups = {"heads": kv_heads, "halves": tensor}.get(self.rows, 1)
        ends = list(itertools.accumulate(size // groups for size in sizes))
        return groups, [(end - size // groups, end) for end, size in zip(ends, sizes, strict=True)]

    def join(self, parts: list[np.ndarray], kv_heads: int) -> np.ndarray:
        """The fused tensor of whole parts, or of what one rank has of each."""
        if len(parts) == 1 or self.rows == "shared":
            return parts[0]
        sizes = [len(part) for part in parts]
        groups, spans = self.groups(sizes, kv_heads, 1)
        inner = parts[0].shape[1:]
        whole = reuse_memory((sum(sizes), *inner), parts[0].dtype)
        for part, (start, stop) in zip(parts, spans, strict=True):
            whole.reshape(groups, -1, *inner)[:, start:stop] = part.reshape(groups, stop - start, *inner)
        return whole


_L = "decoder.layers.{L}"
_H = "model.layers.{L}"
MODEL = (
    Fused("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), split=0),
    Fused(f"{_L}.self_attention.linear_qkv.layer_norm_weight", (f"{_H}.input_layernorm.weight",)),
    Fused(
        f"{_L}.self_attention.linear_qkv.weight",
        tuple(f"{_H}.self_attn.{x}_proj.weight" for x in "qkv"),
        rows="heads",
        split=0,
    ),
    Fused(f"{_L}.self_attention.linear_proj.weight", (f"{_H}.self_attn.o_proj.weight",), split=1),
    Fused(
        f"{_L}.self_attention.linear_proj.post_layernorm.weight",
        (f"{_H}.post_attention_layernorm.weight",),
    ),
    Fused(f"{_L}.mlp.linear_fc1.layer_norm_weight", (f"{_H}.pre_feedforward_layernorm.weight",)),
    Fused(
        f"{_L}.mlp.linear_fc1.weight",
        tuple(f"{_H}.mlp.{x}_proj.weight" for x in ("gate", "up")),
        rows="halves",
        split=0,
    ),
    Fused(f"{_L}.mlp.linear_fc2.weight", (f"{_H}.mlp.down_proj.weight",), split=1),
    Fused(f"{_L}.mlp.linear_fc2.post_layernorm.weight", (f"{_H}.post_feedforward_layernorm.weight",)),
    Fused("decoder.final_layernorm.weight", ("model.norm.weight",)),
)
# The last pipeline stage has a copy of the embedding, which is the output matrix too.
_HEAD = Fused("output_layer.weight", (table.HEAD,), split=0)
# What TransformerEngine keeps for FP8 of each of these modules. Megatron-Bridge does not load a checkpoint without it.
_EXTRA = [
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
# Each fused module: its projections here, the rows of its matrix, and what canonical adapters call those of its own.
_MODULES: dict[str, tuple[dict[str, str], Rows]] = {
    f"{_L}.self_attention.linear_qkv": ({"attn/q": "q", "attn/k": "k", "attn/v": "v"}, "heads"),
    f"{_L}.self_attention.linear_proj": ({"attn/o": ""}, "one"),
    f"{_L}.mlp.linear_fc1": ({"mlp/gate": "gate", "mlp/up": "up"}, "halves"),
    f"{_L}.mlp.linear_fc2": ({"mlp/down": ""}, "one"),
}
# Not weights of the model, and so not read: by how their names begin.
_STATE = ("optimizer.", "rng_state", "common_state", "rerun_state_machine_state", "opt_param_scheduler", "param_groups")


class Tensor(Protocol):
    """A tensor that can be read in parts."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def read(self, index: Index) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class _Layer:
    """A tensor of a torch_dist checkpoint, or one layer of it."""

    store: TorchDist
    name: str
    layer: int | None

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
class _Joined:
    """What ranks have of a tensor, put together along a dim."""

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
        span, found, at = range(self.shape[self.dim])[index[self.dim]], [], 0
        for part in self.parts:
            size = part.shape[self.dim]
            start, stop = max(span.start - at, 0), min(span.stop - at, size)
            if start < stop:
                found.append(part.read((*index[: self.dim], slice(start, stop), *index[self.dim + 1 :])))
            at += size
        return found[0] if len(found) == 1 else np.concatenate(found, self.dim)


@dataclass(frozen=True, eq=False)
class _Part:
    """Of a fused tensor's rows, in each of its groups those from `start` to `stop`."""

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
        found = self.fused.read((slice(first * width, last * width), *index[1:]))
        rows = found.reshape(last - first, width, *found.shape[1:])[:, self.start : self.stop]
        return rows.reshape(-1, *found.shape[1:])[span.start - first * size : span.stop - first * size]


class Tensors:
    """A checkpoint's tensors by Hugging Face's or PEFT's names, as `tensors.Tensors` has those of safetensors."""

    def __init__(self, found: Mapping[str, Tensor]):
        self._found = found
        self.shapes: Shapes = {name: tensor.shape for name, tensor in found.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in found.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor, as stored."""
        return self._found[name].read(index)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a Megatron checkpoint holds, by Megatron's names with a tensor a layer, and what is said beside it."""

    folder: Path  # of this iteration
    layout: str  # "torch_dist" or "torch", and the ranks that wrote it where files tell
    iteration: int | None
    tensors: dict[str, Tensor]
    ignored: tuple[str, ...]  # what is no weight of the model, by kind
    args: dict[str, Any] | None  # Megatron-LM's arguments, as far as plain values go
    ranks: int = 1  # tensor-parallel ranks whose shares of fused rows follow one another


def iteration_folder(folder: Path) -> Path | None:
    """The folder of the iteration that a Megatron checkpoint's folder names, or of the one that it is."""
    tracker = folder / TRACKER
    if tracker.is_file():
        with tracker.open("rb") as file:
            text = file.read(100).decode(errors="replace").strip()
        if text != "release" and not re.fullmatch("[0-9]{1,12}", text):
            raise ValueError(f"{tracker} says {text[:40]!r}; it must name an iteration, as 1000 or release")
        found = folder / (text if text == "release" else f"iter_{int(text):07}")
        if not found.is_dir():
            raise ValueError(f"{tracker} names iteration {text}, and there is no {found}; copy it, or name another one")
        return found
    known = (folder / METADATA).is_file() or (folder / BACKEND_FILE).is_file() or any(folder.glob("mp_rank_*"))
    return folder if known else None


def open_folder(folder: Path) -> Opened:
    """Reads what an iteration's folder says of its tensors. ValueError where it is damaged, or of another kind."""
    legacy = not (folder / METADATA).is_file() and any(folder.glob("mp_rank_*"))
    return _open_legacy(folder) if legacy else _open_torch_dist(folder)


def _open_torch_dist(folder: Path) -> Opened:
    said = folder / BACKEND_FILE
    if not said.exists():
        raise ValueError(
            f"{said} is missing: this is a part of a checkpoint, or one of fsdp_dtensor, which this program does not "
            "read; copy the whole, or save it with --ckpt-format torch_dist"
        )
    backend = read_json(said).get("sharded_backend")
    if backend != "torch_dist":
        raise ValueError(
            f"{said} says that sharded_backend is {reprlib.repr(backend)}; this program reads 'torch_dist'"
        )
    store = TorchDist(folder)
    tensors, ignored, prefix = dict[str, Tensor](), dict[str, int](), _prefix(store.shapes)
    for name, shape in store.shapes.items():
        if name.startswith(_STATE):
            kind = name.split(".")[0]
            ignored[kind] = ignored.get(kind, 0) + 1
            continue
        if "._extra_state" in name:  # which torch itself flattens into tensors
            continue
        name_here = name.removeprefix(prefix)
        if ".layers." in name and not re.search(r"\.layers\.\d+\.", name) and shape:
            if len(tensors) + shape[0] > _MOST_TENSORS:
                raise ValueError(f"{folder} says that {name[:200]} has {shape[0]} layers, which no model has")
            for layer in range(shape[0]):
                tensors[name_here.replace(".layers.", f".layers.{layer}.", 1)] = _Layer(store, name, layer)
        else:
            tensors[name_here] = _Layer(store, name, None)
    for name in store.objects:
        if not name.removeprefix(prefix).split("/")[0].endswith("_extra_state"):
            kind = name.split("/")[0].split(".")[0]
            ignored[kind] = ignored.get(kind, 0) + 1
    for name in [name for name in tensors if name.endswith(".weight_w")]:  # gate and up, apart
        stem = name.removesuffix("_w")
        if f"{stem}_v" in tensors:
            tensors[stem] = _Joined((tensors.pop(name), tensors.pop(f"{stem}_v")), 0)
    common = _common(folder, store)
    return Opened(
        folder=folder,
        layout="torch_dist",
        iteration=_whole(common.get("iteration")),
        tensors=tensors,
        ignored=tuple(f"{kind} ({count})" for kind, count in sorted(ignored.items()) if kind != "common_state"),
        args=_plain(common.get("args")),
    )


def _prefix(names: Iterable[str]) -> str:
    """What Megatron's wrappers put before every name: nothing, or model., or module. a few times."""
    for name in names:
        found = re.match(r"((?:model\.|module\.)+)(?:embedding|decoder)\.", name)
        if found:
            return found[1]
    return ""


def _common(folder: Path, store: TorchDist) -> dict[str, Any]:
    if (folder / "common.pt").is_file():
        content = torch_files.load_torch(folder / "common.pt")
    else:
        names = [name for name in store.objects if name.startswith("common_state/")]
        content = store.object(names[0]) if names else {}
        content = content[0] if isinstance(content, list) and content else content
    if not isinstance(content, dict):
        raise ValueError(f"{folder}: its common state is no dictionary; copy the checkpoint again")
    return content


def _whole(x: Any) -> int | None:
    return x if type(x) is int else None


def _plain(args: Any) -> dict[str, Any] | None:
    return args.state if isinstance(args, Record) and isinstance(args.state, dict) else None


def _open_legacy(folder: Path) -> Opened:
    ranks = {}
    for found in sorted(folder.glob("mp_rank_*")):
        number = re.fullmatch(r"mp_rank_(\d{2,4})(?:_(\d{3,4}))?", found.name)
        if not number:
            raise ValueError(
                f"{found} is no rank's folder that this program reads, as mp_rank_00 and mp_rank_00_000 are"
            )
        path = ranks.setdefault((int(number[1]), int(number[2] or 0)), found / RANK_FILE)
        if path.parent != found:
            raise ValueError(f"{path.parent} and {found} are of one rank at two layouts; delete those of the older one")
    content = {rank: _rank(path) for rank, path in ranks.items()}
    args = _plain(next(iter(content.values())).get("args")) or {}
    tensor, stages = (
        max(_whole(args.get(f"{kind}_model_parallel_size")) or 1, *(1 + rank[axis] for rank in ranks))
        for axis, kind in enumerate(("tensor", "pipeline"))
    )
    if len(ranks) != tensor * stages:
        every = (divmod(number, stages) for number in range(tensor * stages))
        rank, stage = next(rank for rank in every if rank not in ranks)
        raise ValueError(f"{folder} lacks the file of tensor-parallel rank {rank}, stage {stage}; copy it too")
    chunks = _virtual_stages(content[0, 0])
    tensors, first = dict[str, Tensor](), 0
    for chunk, stage in itertools.product(chunks, range(stages)):
        shares = [_state(content[rank, stage], chunk, ranks[rank, stage]) for rank in range(tensor)]
        layers = set()
        for name in dict.fromkeys(itertools.chain(*shares)):
            layer = re.match(r"decoder\.layers\.(\d{1,4})\.", name)
            whole = name
            if layer:
                layers.add(int(layer[1]))
                whole = name.replace(f".{layer[1]}.", f".{first + int(layer[1])}.", 1)
            if not name.endswith("_extra_state"):
                tensors[whole] = _rank_files(name, shares, folder)
        first += 1 + max(layers, default=-1)
    keys = {key for rank in content.values() for key in rank}
    ignored = keys - {"args", "checkpoint_version", "iteration", "num_floating_point_operations_so_far", *chunks}
    return Opened(
        folder=folder,
        layout=f"legacy torch at TP {tensor} and PP {stages}",
        iteration=_whole(content[0, 0].get("iteration")),
        tensors=tensors,
        ignored=tuple(sorted(str(key)[:100] for key in ignored)),
        args=args or None,
        ranks=tensor,
    )


def _rank(path: Path) -> dict[str, Any]:
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
    """The parts of the model in a rank's file: one, or in order those of an interleaved schedule."""
    numbered = [name for name in content if isinstance(name, str) and re.fullmatch(r"model\d{1,3}", name)]
    return ["model"] if "model" in content else sorted(numbered, key=lambda name: int(name[5:]))


def _state(content: dict[str, Any], chunk: str, path: Path) -> dict[str, Any]:
    state = content.get(chunk)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} holds no {chunk}; copy it again")
    return state


def _rank_files(name: str, shares: list[dict[str, Any]], folder: Path) -> Tensor:
    parts = tuple(share.get(name) for share in shares)
    if not all(isinstance(part, torch_files.Stored) for part in parts):
        raise ValueError(f"{folder}: {name} is not a tensor of every tensor-parallel rank; copy the checkpoint again")
    found: Any = parts
    if len({(part.shape, part.dtype) for part in found}) > 1:
        raise ValueError(
            f"{folder}: ranks have {name} in different shapes or dtypes; they are of different checkpoints"
        )
    split = next((fused.split for fused in (*MODEL, _HEAD) if _is(fused, name)), None)
    if split is not None and len(found[0].shape) > split:
        return _Joined(found, split)
    if any(part.read().tobytes() != found[0].read().tobytes() for part in found[1:]):
        raise ValueError(f"{folder}: ranks have different {name}, of which each has all; they are of different steps")
    return found[0]


def _is(fused: Fused, name: str) -> bool:
    return re.sub(r"(?<=\.layers\.)\d+(?=\.)", "{L}", name) == fused.name


def model_tensors(opened: Opened, model: ModelConfig) -> Tensors:
    """The weights by Hugging Face's names. Raises ValueError naming a tensor that is missing, unknown or misshapen."""
    shapes = table.their_shapes(table.MODEL, model)
    shapes |= {table.HEAD: shapes[table.MODEL[0].name]}
    head = (_HEAD,) if _HEAD.name in opened.tensors else ()
    return _split(opened, (*MODEL, *head), shapes, model)


def adapter_fusings(opened: Opened) -> tuple[tuple[Fused, ...], list[str]]:
    """How this checkpoint's adapters are fused, and the projections that have one."""
    names = {re.sub(r"(?<=\.layers\.)\d+(?=\.)", "{L}", name) for name in opened.tensors}
    dora = any(name.endswith("weight_magnitude") for name in names)
    found, projections = list[Fused](), list[str]()
    for module, (parts, _) in _MODULES.items():
        if f"{module}.adapter.linear_in.weight" in names:
            found += fuse_adapter(module, list(parts), dora=dora, canonical=False)
            projections += parts
        apart = [name for name, own in parts.items() if f"{module}.adapter.adapter_{own}.linear_in.weight" in names]
        if apart:
            found += fuse_adapter(module, apart, dora=False, canonical=True)
            projections += apart
    return tuple(found), projections


def is_adapter(opened: Opened) -> bool:
    """Whether a checkpoint holds adapters alone."""
    return bool(opened.tensors) and all(".adapter." in name for name in opened.tensors)


def adapter_tensors(opened: Opened, fusings: tuple[Fused, ...], adapter: AdapterConfig, model: ModelConfig) -> Tensors:
    """The adapter's tensors by PEFT's names. Raises ValueError as `model_tensors` does."""
    return _split(opened, fusings, table.their_shapes(table.table_rows(adapter), model, adapter.rank), model)


def fuse_adapter(module: str, projections: list[str], *, dora: bool, canonical: bool) -> list[Fused]:
    """The tensors of a module's adapter; canonical ones have an A of each projection."""
    own, rows = _MODULES[module]
    parts = {name: table.adapter_rows(name) for name in projections}
    if canonical and any(own.values()):
        return [
            Fused(f"{module}.adapter.adapter_{own[name]}.{end}.weight", (row[part].name,))
            for name, row in parts.items()
            for end, part in (("linear_in", "a"), ("linear_out", "b"))
        ]
    names = {part: tuple(row[part].name for row in parts.values()) for part in "abm"}
    found = [
        Fused(f"{module}.adapter.linear_in.weight", names["a"], rows="shared"),
        Fused(f"{module}.adapter.linear_out.weight", names["b"], rows=rows),
    ]
    # Megatron-Core knows of the halves of matrices only, so that a vector keeps the order of the ranks it was saved by.
    return found + [Fused(f"{module}.adapter.weight_magnitude", names["m"], rows=rows, gathered=True)] * dora


def _split(opened: Opened, fusings: tuple[Fused, ...], shapes: Shapes, model: ModelConfig) -> Tensors:
    layers, expected, found = model.layers, Shapes(), dict[str, Tensor]()
    for fused, layer in ((f, n) for f in fusings for n in (range(layers) if f.stacked else (0,))):
        name, parts = fused.name.format(L=layer), [part.format(L=layer) for part in fused.parts]
        sizes = [shapes[part][0] for part in parts]
        rows = sizes[0] if fused.rows == "shared" else sum(sizes)
        tensor = opened.tensors.get(name)
        # The vocabulary may be filled up to a multiple of 128 for each rank.
        padded = tensor is not None and fused.parts[0] in (table.MODEL[0].name, table.HEAD) and tensor.shape
        if padded and rows < padded[0] and padded[0] % 128 == 0:
            rows = padded[0]
        expected[name] = (rows, *shapes[parts[0]][1:])
        if tensor is None:
            continue
        if fused.rows == "shared":
            found |= dict.fromkeys(parts, tensor)
            continue
        # Whole tensors have all of gate before all of up; what ranks have side by side alternates.
        ranks = opened.ranks if fused.gathered or opened.layout != "torch_dist" else 1
        groups, spans = fused.groups(sizes, model.kv_heads, ranks)
        for part, (start, stop) in zip(parts, spans, strict=True):
            found[part] = tensor if (start, stop) == (0, rows) else _Part(tensor, groups, start, stop)
    table.claim_tensors(expected, {name: tensor.shape for name, tensor in opened.tensors.items()}, opened.folder)
    return Tensors(found)


def written_adapter(adapter: AdapterConfig, *, canonical: bool) -> tuple[Fused, ...]:
    """The tensors of an adapter's checkpoint."""
    wanted, dora = table.match_targets(adapter), adapter.kind == "dora"
    modules = {module: [name for name in parts if name in wanted] for module, (parts, _) in _MODULES.items()}
    found = (fuse_adapter(module, names, dora=dora, canonical=canonical) for module, names in modules.items() if names)
    return tuple(itertools.chain.from_iterable(found))


def shared_tensors(adapter: AdapterConfig) -> list[list[str]]:
    """The projections that have one A where adapters are fused, of which an adapter must then have all."""
    wanted = table.match_targets(adapter)
    return [list(parts) for parts, _ in _MODULES.values() if len(parts) > 1 and not set(wanted).isdisjoint(parts)]


def rank_tensors(model: ModelConfig, stages: int, stage: int) -> Iterator[tuple[Fused, int, str]]:
    """The weights of one pipeline stage: each with its layer and its name there, where layers count from 0."""
    depth = model.layers // stages
    for fused in MODEL:
        for at in range(depth) if fused.stacked else (0,):
            first, last = fused is MODEL[0] and stage == 0, fused is MODEL[-1] and stage == stages - 1
            if fused.stacked or first or last:
                yield fused, stage * depth + at if fused.stacked else 0, fused.name.format(L=at)
    if stage and stage == stages - 1:
        yield MODEL[0], 0, _HEAD.name


def rank_extra_states(model: ModelConfig, stages: int, stage: int) -> Iterator[tuple[str, Any]]:
    """What is kept for FP8 in a rank's file, by name."""
    for name in _EXTRA:
        if "{L}" in name:
            yield from ((name.format(L=layer), _NO_STATE) for layer in range(model.layers // stages))
        elif stage == stages - 1:
            yield name, _NO_STATE
    if stage == stages - 1:
        yield "output_layer._extra_state", None  # Megatron-Core's own modules have none


def extra_states(layers: int, adapter: Iterable[Fused] = ()) -> Iterator[tuple[str, Any]]:
    """The objects that Megatron-Bridge expects beside the weights, or beside an adapter's, each with its content."""
    matrices = [f.name.removesuffix("weight") + "_extra_state" for f in adapter if f.name.endswith(".weight")]
    for name in matrices or _EXTRA:
        key = name.replace(".{L}", "")
        shards = [f"{layer}_{layers}" for layer in range(layers)] if "{L}" in name else ["0_1"]
        for shard in shards:
            yield f"{key}/shard_{shard}", [None if matrices else _NO_STATE]
