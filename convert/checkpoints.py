"""Any checkpoint as one thing: what it is, which arrays it has, and those arrays, placed as asked.

`open_checkpoint` tells the formats apart by the files in a folder and reads headers only; `load_weights` reads of each
array the slices that this process's devices need. Nothing here writes. A folder is one of these:

    huggingface  config.json, model.safetensors or model.safetensors.index.json with its shards
    peft         adapter_config.json, adapter_model.safetensors
    orbax        weights/ and adapter/, or one of them: Orbax checkpoints of nested dicts of our arrays; config.json
                 and adapter_config.json as above
    run          config.txt, checkpoints/STEP/params: a training run's folder, or one of its steps
    megatron     latest_checkpointed_iteration.txt and the folder it names, or that folder: of torch_dist, or of the
                 legacy format torch; weights, or adapters alone
"""

import dataclasses
import re
import reprlib
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from gemma2_jax import config as configs, dims
from gemma2_jax.config import AdapterConfig, ModelConfig
from gemma2_jax.convert.files import hub, memory, orbax as arrays, safetensors as tensors
from gemma2_jax.convert.files.folder import tokenizer_folder
from gemma2_jax.convert.files.memory import Index
from gemma2_jax.convert.files.safetensors import Tensors, read_json
from gemma2_jax.convert.formats import megatron, megatron_config, table
from gemma2_jax.convert.formats.hf_config import model_config
from gemma2_jax.convert.formats.peft_config import adapter_config
from gemma2_jax.convert.formats.table import Row
from gemma2_jax.model.gemma2 import Abstract


class Source(Protocol):
    """One store of arrays."""

    @property
    def shapes(self) -> Abstract:
        """Every array as it is stored."""
        ...

    def read(self, path: str, index: Index, dtype: np.dtype) -> np.ndarray:
        """A part of an array, in the host's memory, in whatever order its dims are there."""
        ...


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a folder holds. `sources` have the arrays."""

    format: Literal["huggingface", "peft", "orbax", "run", "megatron"]
    path: Path
    model: ModelConfig | None = None  # None: an adapter whose model is not at hand
    adapter: AdapterConfig = field(default_factory=AdapterConfig)  # kind "none": there is none
    base: str = ""  # the model under the adapter as its maker named it: a folder or Hub id
    hf: dict[str, Any] | None = None  # the config.json that came with the weights
    tokenizer: Path | None = None  # the folder with the tokenizer
    beside: tuple[Path, ...] = ()  # folders whose small files go where the weights go; of two alike the later
    sources: tuple[Source, ...] = ()
    layout: str = ""  # how its files are made, where one format has several ways
    notes: tuple[str, ...] = ()  # what its reader should know: sentences

    @property
    def shapes(self) -> Abstract:
        """Shape and stored dtype of every array."""
        return {path: shape for source in self.sources for path, shape in source.shapes.items()}

    @property
    def lacks_base(self) -> bool:
        """Whether it is an adapter alone: the weights that the adapter is added to were neither given nor found."""
        return self.adapter.kind != "none" and "embedding" not in self.shapes

    def describe_missing_base(self) -> str:
        """The beginning of a sentence that asks for the model of an adapter alone."""
        name = self.base or "a model that it does not name"
        return f"{self.path} is an adapter to {name}, whose weights are not at hand"


def open_checkpoint(
    path: str | Path,
    base: "str | Path | Checkpoint | None" = None,
    hf_config: str | Path | None = None,
    model: ModelConfig | None = None,
) -> Checkpoint:
    """Finds out what a folder, or a model on the Hugging Face Hub, is. Reads headers only.

    Args:
      path: a folder, or a Hub id such as google/gemma-2-2b.
      base: the model that an adapter is for. By default the folder that its config names, if it is there.
      hf_config: instead of a base, a folder or Hub id with the config.json of a model whose weights are not needed, for
        an adapter, or for a Megatron checkpoint that does not say its config.
      model: instead of either, what a Megatron checkpoint is to be a checkpoint of.

    Raises ValueError when it is none of the known formats, or a damaged or unsupported one.
    """
    folder = _containing_folder(path)
    opening = _OPENING.get()
    if folder.resolve() in opening:
        raise ValueError(f"{folder} is named as its own base model, directly or by what it names; name the real one")
    token = _OPENING.set((*opening, folder.resolve()))
    try:
        return _open(folder, base, hf_config, model)
    finally:
        _OPENING.reset(token)


# The folders whose opening led to the one that is being opened.
_OPENING: ContextVar[tuple[Path, ...]] = ContextVar("_OPENING", default=())


def _open(
    folder: Path,
    base: "str | Path | Checkpoint | None",
    hf_config: str | Path | None,
    model: ModelConfig | None,
) -> Checkpoint:
    under = base if isinstance(base, Checkpoint) or base is None else open_checkpoint(base)
    if hf_config is not None:
        under = _describe_folder(_containing_folder(hf_config, weights=False))
    if model is not None and megatron.iteration_folder(folder):
        under = Checkpoint(format="megatron", path=folder, model=model)
    for is_one, opened in _FORMATS:
        if is_one(folder):
            return opened(folder, under)
    found = ", ".join(sorted(file.name for file in folder.iterdir())[:20]) or "nothing"
    raise ValueError(
        f"{folder} is no checkpoint that this program knows: it holds {found}. Known are Hugging Face folders "
        "(config.json, model.safetensors or its shards and index), PEFT adapters (adapter_config.json, "
        "adapter_model.safetensors), Orbax folders (weights/ or adapter/), runs (config.txt, checkpoints/) and "
        "Megatron checkpoints (latest_checkpointed_iteration.txt, .metadata or mp_rank_00/)"
    )


def load_weights(checkpoint: Checkpoint, wanted: Abstract) -> dict[str, jax.Array]:
    """The arrays of `wanted`, by path, in its dtypes and shardings (none: on the first device).

    Stacks of layers may be wanted longer than they are, with zeros after the last layer.

    Raises ValueError naming an array that the checkpoint lacks, or has in another shape.
    """
    shapes = checkpoint.shapes
    for path, want in wanted.items():
        if path not in shapes:
            raise ValueError(f"{checkpoint.path} has no {path}; it holds {_inventory(checkpoint)}")
        have = shapes[path].shape
        if have != want.shape and not (path.startswith("blocks/") and have == (have[0], *want.shape[1:]) < want.shape):
            raise ValueError(
                f"{checkpoint.path} is a checkpoint of another config: it has {path} with shape "
                f"{shapes[path].shape}, and {want.shape} is wanted"
            )
    return {path: _read_sharded(_source(checkpoint, path), path, want) for path, want in wanted.items()}


def read_array(checkpoint: Checkpoint, path: str, index: Index) -> np.ndarray:
    """A part of an array as it is stored, in the host's memory; best one layer, or some rows, as memory goes."""
    source = _source(checkpoint, path)
    return source.read(path, index, source.shapes[path].dtype)


def _source(checkpoint: Checkpoint, path: str) -> Source:
    return next(source for source in checkpoint.sources if path in source.shapes)


def _read_sharded(source: Source, path: str, want: jax.ShapeDtypeStruct) -> jax.Array:
    @cache  # devices that hold copies of one slice ask for it once each
    def part(index: Index):
        have = [range(size)[at] for size, at in zip(source.shapes[path].shape, index, strict=True)]
        shape = [len(range(size)[at]) for size, at in zip(want.shape, index, strict=True)]
        if not have[0]:
            return np.zeros(shape, want.dtype)
        found = source.read(path, tuple(slice(at.start, at.stop) for at in have), want.dtype)
        missing = shape[0] - len(found)
        return np.pad(found, [(0, missing)] + [(0, 0)] * (found.ndim - 1)) if missing else found

    sharding = want.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(want.shape, sharding, part)


@dataclass(frozen=True, kw_only=True)
class _Safetensors:
    """Tensors by Hugging Face's or PEFT's names, stacked and laid out as ours while they are read."""

    rows: dict[str, Row]
    size: dict[str, int]
    tensors: Tensors | megatron.Tensors
    shapes: Abstract

    @classmethod
    def open(
        cls, folder: Path, files: Tensors | megatron.Tensors, rows: tuple[Row, ...], model: ModelConfig, rank: int = 0
    ):
        found = {name: shape for name, shape in files.shapes.items() if name != table.HEAD}
        table.claim_tensors(table.their_shapes(rows, model, rank), found, folder)
        for name in found:
            tensors.check_dtype(files.dtypes[name], f"{folder}: {name}")
        shapes: Abstract = {}
        for row in rows:
            dtype = jnp.result_type(*(files.dtypes[name] for name in row.names(model.layers)))
            shapes[row.path] = jax.ShapeDtypeStruct(dims.weight_shape(row.letters, model, rank), dtype)
        return cls(rows={row.path: row for row in rows}, size=dims.dim_sizes(model, rank), tensors=files, shapes=shapes)

    def read(self, path: str, index: Index, dtype: np.dtype) -> np.ndarray:
        return self.rows[path].join(self.size, dtype, self.tensors.read, index)


@dataclass(frozen=True, kw_only=True)
class _Orbax:
    """An Orbax checkpoint of a nested dict of our arrays."""

    arrays: arrays.Reader
    shapes: Abstract

    @classmethod
    def open(cls, folder: Path, rows: tuple[Row, ...], model: ModelConfig, rank: int = 0, *, of_run: bool = False):
        reader, expected = arrays.Reader(folder), table.our_shapes(rows, model, rank)
        shapes = dict(reader.shapes)
        if of_run:  # whose pipeline stages may have filled up the stacks with zeros: see `step.Program`
            for path, shape in expected.items():
                if path.startswith("blocks/") and path in shapes and shapes[path].shape > shape:
                    shapes[path] = shapes[path].update(shape=(shape[0], *shapes[path].shape[1:]))
        table.claim_tensors(expected, {path: leaf.shape for path, leaf in shapes.items()}, folder)
        for path, leaf in shapes.items():
            tensors.check_dtype(leaf.dtype, f"{folder}: {path}")
        return cls(arrays=reader, shapes=shapes)

    def read(self, path: str, index: Index, dtype: np.dtype) -> np.ndarray:
        shape = self.shapes[path].shape  # of a run the stack may be longer
        within = tuple(range(size)[at] for size, at in zip(shape, index, strict=True))
        return self.arrays.read(path, tuple(slice(at.start, at.stop) for at in within)).astype(dtype, copy=False)


def _item(folder: Path) -> Path | None:
    """Where the arrays of an Orbax checkpoint are: Orbax's second API puts them one folder down."""
    return next((at for at in (folder, folder / "state") if (at / arrays.METADATA).is_file()), None)


def _is_huggingface(folder: Path) -> bool:
    return any((folder / f"{tensors.MODEL}{end}").is_file() for end in ("", ".index.json"))


def _open_huggingface(folder: Path, under: Checkpoint | None) -> Checkpoint:
    hf = read_json(folder / "config.json")
    model = model_config(hf, folder / "config.json")
    _missing_base(folder, model, under)
    files = Tensors(folder, tensors.MODEL)
    source = _Safetensors.open(folder, files, table.MODEL, model)
    table.check_tied_head(files.shapes, files.read, folder)
    found = Checkpoint(
        format="huggingface",
        path=folder,
        model=model,
        hf=hf,
        tokenizer=tokenizer_folder(folder),
        beside=(folder,),
        sources=(source,),
    )
    # With an adapter beside the model, transformers loads both.
    return _open_peft(folder, found) if _is_peft(folder) else found


def _is_peft(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("adapter_config.json", tensors.ADAPTER))


def _open_peft(folder: Path, under: Checkpoint | None) -> Checkpoint:
    peft = read_json(folder / "adapter_config.json")
    files = Tensors(folder, tensors.ADAPTER)
    projections = table.adapted_rows(re.sub(r"(?<=\.layers\.)\d+", "{L}", name) for name in files.shapes)
    adapter = adapter_config(peft, projections, folder / "adapter_config.json")
    tokenizer = tokenizer_folder(folder)
    alone = Checkpoint(format="peft", path=folder, adapter=adapter, tokenizer=tokenizer, beside=(folder,))
    source = partial(_Safetensors.open, folder, files, table.table_rows(adapter))
    return _with_base(alone, under, source, peft.get("base_model_name_or_path"))


def _is_orbax(folder: Path) -> bool:
    return any(_item(folder / name) for name in ("weights", "adapter"))


def _open_orbax(folder: Path, under: Checkpoint | None) -> Checkpoint:
    weights, adapter = _item(folder / "weights"), _item(folder / "adapter")
    only = Checkpoint(format="orbax", path=folder, tokenizer=tokenizer_folder(folder), beside=(folder,))
    if weights:
        hf = read_json(folder / "config.json")
        model = model_config(hf, folder / "config.json")
        _missing_base(folder, model, under)
        under = replace(only, model=model, hf=hf, sources=(_Orbax.open(weights, table.MODEL, model),))
    if not adapter:
        assert under is not None
        return under
    peft = read_json(folder / "adapter_config.json")
    projections = table.adapted_rows(arrays.Reader(adapter).shapes)
    adapted = replace(only, adapter=adapter_config(peft, projections, folder / "adapter_config.json"))
    source = partial(_Orbax.open, adapter, table.table_rows(adapted.adapter))
    return _with_base(adapted, under, source, peft.get("base_model_name_or_path"))


def _run_step(folder: Path) -> tuple[Path, Path] | None:
    """The folder of a run and that of its newest step, or of the step that `folder` is."""
    folder = folder.absolute()
    if folder.name.isdecimal() and folder.parent.name == "checkpoints" and (folder.parents[1] / "config.txt").is_file():
        return folder.parents[1], folder
    if not (folder / "config.txt").is_file() or not (folder / "checkpoints").is_dir():
        return None
    steps = [step for step in (folder / "checkpoints").iterdir() if step.name.isdecimal()]
    return (folder, max(steps, key=lambda step: int(step.name))) if steps else None


def _is_run(folder: Path) -> bool:
    return _run_step(folder) is not None


def _open_run(folder: Path, under: Checkpoint | None) -> Checkpoint:
    found = _run_step(folder)
    assert found is not None
    workdir, step = found
    said = workdir / "config.txt"
    try:
        text = memory.read_bounded(said, 1 << 20).decode()
    except ValueError as error:
        raise ValueError(f"{said} is damaged ({error}); copy it again") from error
    config = configs.from_text(text, str(said))
    params = _item(step / "params")
    if params is None:
        raise ValueError(f"{step} has no params; name another of {workdir / 'checkpoints'}")
    kept = workdir / "tokenizer"
    hf = read_json(kept / "config.json") if (kept / "config.json").is_file() else None
    run = Checkpoint(
        format="run",
        path=folder,
        model=config.model,
        adapter=config.adapter,
        hf=hf,
        tokenizer=tokenizer_folder(kept),
        beside=(kept,),
    )
    if config.adapter.kind == "none":
        _missing_base(folder, config.model, under)
        whole = replace(run, sources=(_Orbax.open(params, table.MODEL, config.model, of_run=True),))
        start = _local_path(config.init, config.model)
        return _check_after_norm(start, whole) if start else whole
    if not config.init:
        raise ValueError(f"{folder} trained an adapter on random weights, which nothing holds; train it with init set")
    source = partial(_Orbax.open, params, table.table_rows(config.adapter), of_run=True)
    return _with_base(run, under or open_checkpoint(config.init, model=config.model), source, config.init)


def _is_megatron(folder: Path) -> bool:
    return megatron.iteration_folder(folder) is not None


def _open_megatron(folder: Path, under: Checkpoint | None) -> Checkpoint:
    at = megatron.iteration_folder(folder)
    assert at is not None
    opened = megatron.open_folder(at)
    said = at / "run_config.yaml"
    run = megatron_config.read_yaml(said) if said.is_file() else None
    alone = megatron.is_adapter(opened)
    asked = under.model if under else None
    stated = megatron_config.model_config(run, said) if run else asked
    model = asked or stated
    if stated:
        _missing_base(said if run else at, stated, replace(under, sources=()) if under and alone else under)
    if model is None:
        raise ValueError(
            f"{folder} does not say its config (there is no {said.name}); give --hf-config, a folder with the model's "
            "config.json or its Hub id"
        )
    if opened.args:
        megatron_config.check_args(opened.args, model, at)
    kept = at / "tokenizer"
    found = Checkpoint(
        format="megatron",
        path=folder,
        model=model,
        tokenizer=tokenizer_folder(kept),
        beside=(kept,) if kept.is_dir() else (),
        layout=opened.layout
        + ("" if not run else " at TP {} and PP {}".format(*megatron_config.parallel_sizes(run, said))),
        notes=(f"not read, as it is no weight: {', '.join(opened.ignored)}",) if opened.ignored else (),
    )
    if not alone:
        files = megatron.model_tensors(opened, model)
        source = _Safetensors.open(at, files, table.MODEL, model)
        table.check_tied_head(files.shapes, files.read, at)
        whole = replace(found, sources=(source,))
        return _check_after_norm(under, whole) if under else whole
    if run is None:
        raise ValueError(f"{at} holds an adapter, and no {said.name} that says its scale; copy that file too")
    tensor = megatron_config.parallel_sizes(run, said)[0]
    fusings, projections = megatron.adapter_fusings(opened)
    adapter = megatron_config.adapter_config(run, projections, said)

    def adapted(model: ModelConfig, rank: int) -> Source:
        files = megatron.adapter_tensors(replace(opened, ranks=tensor), fusings, adapter, model)
        return _Safetensors.open(at, files, table.table_rows(adapter), model, rank)

    note = (
        f"its {' and '.join(adapter.unmergeable_targets)} act after the post-norm, as Megatron-Bridge trains "
        "them and PEFT does not (adapter.after_norm)"
    )
    found = replace(found, adapter=adapter, notes=(*found.notes, note) if adapter.unmergeable_targets else found.notes)
    start = run.get("checkpoint")
    start = start.get("pretrained_checkpoint") if isinstance(start, dict) else None
    return _with_base(found, under, adapted, start if isinstance(start, str) else None)


def _describe_shapes(one: ModelConfig, other: ModelConfig) -> str:
    names = [field.name for field in dataclasses.fields(one)]
    return ", ".join(
        f"{name} {getattr(one, name)} and not {getattr(other, name)}"
        for name in names
        if getattr(one, name) != getattr(other, name)
    )


# Tried in this order; a folder is the first that it can be.
_FORMATS: tuple[tuple[Callable[[Path], bool], Callable[[Path, Checkpoint | None], Checkpoint]], ...] = (
    (_is_orbax, _open_orbax),
    (_is_run, _open_run),
    (_is_huggingface, _open_huggingface),
    (_is_peft, _open_peft),
    (_is_megatron, _open_megatron),
)


def _describe_folder(folder: Path) -> Checkpoint:
    """A model of which the config alone is of interest."""
    hf = read_json(folder / "config.json")
    return Checkpoint(
        format="huggingface",
        path=folder,
        model=model_config(hf, folder / "config.json"),
        hf=hf,
        tokenizer=tokenizer_folder(folder),
        beside=(folder,),
    )


def _with_base(alone: Checkpoint, under: Checkpoint | None, source: Callable, name: str | None) -> Checkpoint:
    """An adapter on its model, by default the folder `name`; without a model the shapes of its arrays are unknown."""
    if not isinstance(name, str | None):
        raise ValueError(f"{alone.path} names {reprlib.repr(name)} as its model, which is no folder or Hub id")
    under = under or _local_path(name)
    if under is None:
        sources = (source(alone.model, alone.adapter.rank),) if alone.model else ()
        return replace(alone, base=name or "", sources=sources)
    if under.adapter.kind != "none":
        raise ValueError(f"{under.path} has an adapter already, {alone.path} is another; merge the first one first")
    assert under.model is not None
    model = alone.model or under.model
    if replace(model, max_length=under.model.max_length) != under.model:
        raise ValueError(f"{alone.path} is an adapter to another model than {under.path}; give its own, {name}")
    sources = (*under.sources, source(model, alone.adapter.rank))
    return _check_after_norm(under, replace(alone, model=model, base=name or str(under.path), sources=sources))


def _check_after_norm(under: Checkpoint, above: Checkpoint) -> Checkpoint:
    """`above` with what it lacks beside its weights, and the model that it started from has."""
    return replace(
        above,
        hf=above.hf or under.hf,
        tokenizer=above.tokenizer or under.tokenizer,
        beside=(*under.beside, *above.beside),
    )


def _local_path(name: str | None, model: ModelConfig | None = None) -> Checkpoint | None:
    return open_checkpoint(name, model=model) if name and Path(name).is_dir() else None


def _missing_base(folder: Path, model: ModelConfig, under: Checkpoint | None) -> None:
    """Raises ValueError if a base is given for what says itself what it is, or another config."""
    if under is not None and under.sources:
        raise ValueError(f"{folder} is not an adapter alone, so it takes no base model; {under.path} was given as one")
    if under and under.model and replace(model, max_length=under.model.max_length) != under.model:
        raise ValueError(f"{folder} is of another model than was asked for ({_describe_shapes(model, under.model)})")


def _inventory(checkpoint: Checkpoint) -> str:
    parts = [f"{len(source.shapes)} arrays such as {next(iter(source.shapes))}" for source in checkpoint.sources]
    return " and ".join(parts) or f"an adapter whose model is not at hand ({checkpoint.base or 'not named'})"


def _containing_folder(path: str | Path, *, weights: bool = True) -> Path:
    """The folder that is meant; a Hub id's files are downloaded, once, with the weights or without."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{path} is a file; name the folder that holds it")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise ValueError(f"there is no folder {path}")
    return hub.download(str(path), weights=weights)
