"""Opens Megatron's checkpoints of Gemma 2, and has their weights by Hugging Face's names.

A `torch_dist` checkpoint stacks the layers, or has a tensor for each layer. Megatron's legacy format, `torch`, has a
file for each rank, with that rank's share of each tensor. `megatron_tensors` has the table of the tensors,
`megatron_adapters` the adapters, `megatron_config` the configs; `files.torch_dist` and `files.torch_files` read and
write the files.
"""

import itertools
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma2_jax.convert.files import torch_files
from gemma2_jax.convert.files.memory import Index, Shapes
from gemma2_jax.convert.files.pickles import Record
from gemma2_jax.convert.files.safetensors import read_json
from gemma2_jax.convert.files.tensors import Tensor, Tensors
from gemma2_jax.convert.files.torch_dist import METADATA, TorchDist
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.formats.megatron_tensors import HEAD, MODEL, ConcatenatedTensor, Fused
from gemma2_jax.model_config import ModelConfig

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
class StoredTensor:
    """A tensor of a torch_dist checkpoint, or one layer of a stack."""

    store: TorchDist
    name: str
    layer: int | None  # None: the whole tensor

    @property
    def row_starts(self) -> list[int]:
        """The rows at which chunks start, whatever their layer."""
        return self.store.chunk_starts(self.name, 0 if self.layer is None else 1)

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
    if (folder / "context").is_dir() and (folder / "weights" / BACKEND_FILE).is_file():  # NeMo 2
        return folder / "weights"
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
                tensors[model_name.replace(".layers.", f".layers.{layer}.", 1)] = StoredTensor(store, name, layer)
        else:
            tensors[model_name] = StoredTensor(store, name, None)
    for name in store.objects:
        if not name.removeprefix(prefix).split("/")[0].endswith("_extra_state"):
            kind = name.split("/")[0].split(".")[0]
            ignored[kind] = ignored.get(kind, 0) + 1
    for name in [name for name in tensors if name.endswith(".weight_w")]:  # weight_w is gate and weight_v is up
        stem = name.removesuffix("_w")
        if f"{stem}_v" in tensors:
            tensors[stem] = ConcatenatedTensor((tensors.pop(name), tensors.pop(f"{stem}_v")), 0)
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
    split = next((fused.rank_dim for fused in (*MODEL, HEAD) if fused.name == layer_free_name(name)), None)
    if split is not None and len(stored[0].shape) > split:
        return ConcatenatedTensor(stored, split)
    if any(part.read().tobytes() != stored[0].read().tobytes() for part in stored[1:]):
        raise ValueError(f"{folder}: ranks have different {name}, of which each has all; they are of different steps")
    return stored[0]


def layer_free_name(name: str) -> str:
    """A tensor's name with {L} in place of its layer."""
    return re.sub(r"(?<=\.layers\.)\d+(?=\.)", "{L}", name)


def model_tensors(opened: Opened, model: ModelConfig) -> Tensors:
    """The weights by Hugging Face's names.

    Raises ValueError naming a tensor that is missing, unknown or of another shape than the config says.
    """
    shapes = table.tensor_shapes(table.MODEL, model)
    shapes |= {table.HEAD: shapes[table.MODEL[0].name]}
    head = (HEAD,) if HEAD.name in opened.tensors else ()
    return split_fused(opened, (*MODEL, *head), shapes, model)


def split_fused(opened: Opened, fusings: tuple[Fused, ...], shapes: Shapes, model: ModelConfig) -> Tensors:
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
        # A whole tensor has all of gate before all of up; concatenated shares of ranks alternate between the two.
        together = fused.rows == "halves" and opened.layout == "torch_dist"
        split = fused.split(tensor, sizes, model.kv_heads, 1 if together else opened.ranks)
        tensors |= dict(zip(parts, split, strict=True))
    table.claim_tensors(expected, {name: tensor.shape for name, tensor in opened.tensors.items()}, opened.folder)
    return Tensors(tensors)
