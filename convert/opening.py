"""Opens checkpoints of every format as one type, `checkpoints.Checkpoint`.

`open_checkpoint` tells the formats apart by the files in a folder and reads headers only. A folder is one of these:

    huggingface  config.json, model.safetensors or model.safetensors.index.json with its shards, or pytorch_model.bin
                 likewise
    peft         adapter_config.json, adapter_model.safetensors or adapter_model.bin
    orbax        weights/ and adapter/, or one of them: Orbax checkpoints of nested dicts of our arrays; config.json
                 and adapter_config.json as in the two formats before
    run          config.txt, checkpoints/STEP/params: a training run's folder, or one of its steps
    megatron     latest_checkpointed_iteration.txt and the folder it names, or that folder, in Megatron's format
                 torch_dist or in its legacy format torch; it holds weights, or adapters alone. NeMo 2 has such a folder
                 as weights/, beside context/
    deepmind     an Orbax checkpoint with the arrays of google-deepmind/gemma, or a folder with one such, as on Kaggle
    gguf         one .gguf file, or its path: weights, or a LoRA alone

What else people have is in `recognition`, which says what it is.
"""

import os
import re
import reprlib
import shlex
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gemma2_jax import config as configs, config_text
from gemma2_jax.command_line import suggest
from gemma2_jax.convert import recognition
from gemma2_jax.convert.checkpoints import Checkpoint, attach_base, inherit_files, refuse_base
from gemma2_jax.convert.files import hub, memory, orbax, safetensors
from gemma2_jax.convert.files.folder import expand_path, generation_file, has_model_only, tokenizer_folder
from gemma2_jax.convert.files.gguf import open_file
from gemma2_jax.convert.files.safetensors import read_json
from gemma2_jax.convert.files.tensors import Tensors, open_tensors
from gemma2_jax.convert.formats import (
    deepmind,
    gguf,
    gguf_tokenizer,
    megatron,
    megatron_adapters,
    megatron_config,
    peft,
    peft_config,
    state_dict,
    table,
)
from gemma2_jax.convert.formats.hf_config import model_config
from gemma2_jax.convert.formats.table import Row
from gemma2_jax.convert.sources import OrbaxSource, Source, TensorSource, WeightTensor
from gemma2_jax.model_config import ModelConfig


def open_checkpoint(
    path: str | Path,
    base: "str | Path | Checkpoint | None" = None,
    hf_config: str | Path | None = None,
    model: ModelConfig | None = None,
    drop: Sequence[str] = (),
) -> Checkpoint:
    """Opens a folder, or a model on the Hugging Face Hub, whatever its format. Reads headers only.

    Args:
      path: a folder, or a Hub id such as google/gemma-2-2b.
      base: the model that an adapter is for. By default the folder that the adapter's config names, if it exists.
      hf_config: instead of a base, a folder or Hub id with the config.json of a model whose weights are not needed, for
        an adapter, or for a checkpoint of Megatron or of google-deepmind/gemma that does not say its config.
      model: instead of either, the config of such a checkpoint.
      drop: patterns (as of a shell) of names of a Hugging Face folder's tensors to leave out, such as "v_head.*".

    Raises ValueError where the format is none of the known ones, or the checkpoint is damaged or has what this program
    does not implement.
    """
    folder = locate_folder(path)
    opening = _OPENING.get()
    if folder.resolve() in opening:
        raise ValueError(f"{folder} is named as its own base model, directly or by what it names; name the real one")
    token = _OPENING.set((*opening, folder.resolve()))
    try:
        return _note_tokenizer(_open_folder(folder, base, hf_config, model, drop))
    finally:
        _OPENING.reset(token)


def _note_tokenizer(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a note where its tokenizer.json is made from another file."""
    place = checkpoint.tokenizer
    note = f"{place} has tokenizer.model and no tokenizer.json, which is made from it"
    if place is None or not has_model_only(place) or note in checkpoint.notes:
        return checkpoint
    return replace(checkpoint, notes=(*checkpoint.notes, note))


# The folders whose opening led to the opening of the present one, so that a circle of base models is found.
_OPENING: ContextVar[tuple[Path, ...]] = ContextVar("_OPENING", default=())


def _open_folder(
    folder: Path,
    base: "str | Path | Checkpoint | None",
    hf_config: str | Path | None,
    model: ModelConfig | None,
    drop: Sequence[str],
) -> Checkpoint:
    base = base if isinstance(base, Checkpoint) or base is None else open_checkpoint(base)
    if hf_config is not None:
        base = _open_config(locate_folder(hf_config, weights=False))
    if not (_is_orbax(folder) or _is_run(folder)):
        recognition.refuse_foreign(folder)
    open_format = next((open_format for has_format, open_format in _FORMATS if has_format(folder)), None)
    if open_format == _open_huggingface:
        return _open_huggingface(folder, base, drop)
    if drop:
        raise ValueError(f"{folder} is no Hugging Face folder, whose tensors --drop leaves out; leave out --drop")
    if model is not None and open_format in (_open_megatron, _open_deepmind):
        base = Checkpoint(format="huggingface", path=folder, model=model)
    if open_format:
        return open_format(folder, base)
    named = sorted(child for child in folder.iterdir() if child.is_dir() and peft.is_adapter(child))
    if len(named) == 1:  # PEFT saves an adapter that is not called "default" in a folder of its name
        return _open_peft(named[0], base)
    if named:
        raise ValueError(f"{folder} holds the adapters {', '.join(child.name for child in named)}; name one of them")
    if (folder / "config.txt").is_file() and (folder / "checkpoints").is_dir():
        raise ValueError(f"{folder} is a training run that has no whole checkpoint yet; resume it, and try again then")
    files = ", ".join(map(_describe_file, sorted(folder.iterdir())[:20])) or "nothing"
    raise ValueError(
        f"{folder} is no checkpoint that this program knows: it holds {files}. Known are Hugging Face folders "
        "(config.json, model.safetensors or pytorch_model.bin, or its shards and index), PEFT adapters "
        "(adapter_config.json, adapter_model.safetensors or .bin), Orbax folders (weights/ or adapter/, or the layout "
        "of google-deepmind/gemma), runs (config.txt, checkpoints/), Megatron checkpoints "
        "(latest_checkpointed_iteration.txt, .metadata or mp_rank_00/) and GGUF files"
    )


def _describe_file(path: Path) -> str:
    """The name of what is in a folder, and what it is where it is no file."""
    if path.is_dir():
        return f"{path.name}/"
    return path.name if path.is_file() else f"{path.name} ({'a link to nothing' if path.is_symlink() else 'no file'})"


def _orbax_root(folder: Path) -> Path | None:
    """The folder with an Orbax checkpoint's arrays, which Orbax's second API puts one level down, or None."""
    return next((root for root in (folder, folder / "state") if (root / orbax.METADATA).is_file()), None)


def _model_files(folder: Path) -> list[str]:
    """The files of weights, or of which there are indexes, in the order in which transformers looks for them."""
    return [name for name in recognition.MODEL_FILES
            if any((folder / f"{name}{end}").is_file() for end in ("", ".index.json"))]  # fmt: skip


def _is_huggingface(folder: Path) -> bool:
    return bool(_model_files(folder))


def _open_huggingface(folder: Path, base: Checkpoint | None, drop: Sequence[str] = ()) -> Checkpoint:
    hf = read_json(folder / "config.json")
    model = model_config(hf, folder / "config.json")
    refuse_base(folder, model, base)
    stem, *others = _model_files(folder)
    stored = open_tensors(folder, stem, optional=state_dict.is_head)
    tied = hf.get("tie_word_embeddings") is not False
    tensors, notes = state_dict.open_state_dict(stored, drop, folder, tied=tied)
    source = TensorSource.open(folder, tensors, table.MODEL, model)
    command = f"python -m gemma2_jax.convert {shlex.quote(str(folder))} NEW --drop '*{table.HEAD}' --to hf"
    remedy = f"; {command} takes the embedding for it"
    table.check_tied_head(tensors.shapes, tensors.read, folder, remedy)
    if not tied:
        notes += ("its config unties the output matrix, which is the embedding all the same",)
    if others:
        notes += (f"{' and '.join(others)} was not read, as {stem} is there",)
    whole = Checkpoint(
        format="huggingface",
        path=folder,
        model=model,
        hf=hf,
        tokenizer=tokenizer_folder(folder),
        generation=generation_file(folder),
        sources=(source,),
        layout="" if stem == safetensors.MODEL else stem,
        notes=notes,
    )
    # Transformers loads an adapter that lies beside the model too.
    return _open_peft(folder, whole) if peft.is_adapter(folder) else whole


def _is_deepmind(folder: Path) -> bool:
    return deepmind.find_root(folder) is not None


def _open_deepmind(folder: Path, base: Checkpoint | None) -> Checkpoint:
    root = deepmind.find_root(folder)
    assert root is not None
    own = _open_config(folder) if (folder / "config.json").is_file() else None
    given = base or own
    opened = deepmind.open_tree(root, given.model if given else None)
    refuse_base(folder, opened.model, base)
    whole = Checkpoint(
        format="deepmind",
        path=folder,
        model=opened.model,
        tokenizer=tokenizer_folder(folder) or tokenizer_folder(root),
        sources=(TensorSource.open(root, opened.tensors, opened.rows, opened.model),),
        notes=opened.notes,
    )
    return inherit_files(whole, given) if given else whole


def _open_peft(folder: Path, base: Checkpoint | None) -> Checkpoint:
    opened = peft.open_adapter(folder)
    base_name = opened.config.get("base_model_name_or_path")
    base = _prefer_weights(base, _check_base_name(folder, base_name))
    adapted = Checkpoint(
        format="peft",
        path=folder,
        adapter=opened.adapter_config(base.model.layers if base and base.model else None),
        grown=opened.grown,
        tokenizer=tokenizer_folder(folder),
        generation=generation_file(folder),
        notes=opened.notes,
    )

    def read_base(row: Row, layer: int | None) -> WeightTensor:
        if base is None or base.model is None or row.path not in base.shapes:
            raise ValueError(
                f"{folder} changes a part of {row.name} only, so that its model's weights are needed too; name their "
                "folder in base_model_name_or_path of its adapter_config.json, or give them, and this as --adapter"
            )
        return WeightTensor(source=base.find_source(row.path), model=base.model, row=row, layer=layer)

    def open_source(model: ModelConfig) -> Source:
        tensors = opened.tensors(adapted.adapter, model, read_base)
        rows = table.table_rows(adapted.adapter, model.layers, grown=adapted.grown)
        return TensorSource.open(folder, tensors, rows, model)

    return attach_base(adapted, base, open_source, base_name, opened.vocabulary)


def _is_orbax(folder: Path) -> bool:
    return any(_orbax_root(folder / name) for name in ("weights", "adapter"))


def _open_orbax(folder: Path, base: Checkpoint | None) -> Checkpoint:
    weights, adapter = _orbax_root(folder / "weights"), _orbax_root(folder / "adapter")
    empty = Checkpoint(
        format="orbax", path=folder, tokenizer=tokenizer_folder(folder), generation=generation_file(folder)
    )
    if weights:
        hf = read_json(folder / "config.json")
        model = model_config(hf, folder / "config.json")
        refuse_base(folder, model, base)
        base = replace(empty, model=model, hf=hf, sources=(OrbaxSource.open(weights, table.MODEL, model),))
    if not adapter:
        assert base is not None
        return base
    config, shapes = read_json(folder / peft.CONFIG), orbax.Reader(adapter).shapes
    stored = {path: shape.shape for path, shape in shapes.items()}
    settings = peft_config.stored_config(config, stored, folder / peft.CONFIG)
    grown = "embedding" in shapes and not settings.replaces("embedding")
    adapted = replace(empty, adapter=settings, grown=grown)

    def open_source(model: ModelConfig) -> Source:
        return OrbaxSource.open(adapter, table.table_rows(settings, model.layers, grown=grown), model)

    base_name, embedding = config.get("base_model_name_or_path"), shapes.get("embedding")
    base = _prefer_weights(base, _check_base_name(folder, base_name))
    return attach_base(adapted, base, open_source, base_name, embedding.shape[0] if embedding else None)


def _run_step(folder: Path) -> tuple[Path, Path] | None:
    """The folder of a run and that of its newest step, where `folder` is a run or a step of one (then that step)."""
    step = folder.absolute()
    if step.name.isdecimal() and step.parent.name == "checkpoints" and (step.parents[1] / "config.txt").is_file():
        return step.parents[1], step
    if not (folder / "config.txt").is_file() or not (folder / "checkpoints").is_dir():
        return None
    steps = [step for step in (folder / "checkpoints").iterdir() if step.name.isdecimal()]
    return (folder, max(steps, key=lambda step: int(step.name))) if steps else None


def _is_run(folder: Path) -> bool:
    return _run_step(folder) is not None


def _open_run(folder: Path, base: Checkpoint | None) -> Checkpoint:
    run_step = _run_step(folder)
    assert run_step is not None
    workdir, step = run_step
    config_path = workdir / "config.txt"
    try:
        text = memory.read_bounded(config_path, 1 << 20).decode()
    except ValueError as error:
        raise ValueError(f"{config_path} is damaged ({error}); copy it again") from error
    config = config_text.from_text(text, str(config_path))
    params = _orbax_root(step / "params")
    if params is None:
        raise ValueError(f"{step} has no params; name another of {workdir / 'checkpoints'}")
    tokenizer = workdir / "tokenizer"
    hf = read_json(tokenizer / "config.json") if (tokenizer / "config.json").is_file() else None
    run = Checkpoint(
        format="run",
        path=folder,
        model=config.model,
        adapter=config.adapter,
        hf=hf,
        tokenizer=tokenizer_folder(tokenizer),
        generation=generation_file(tokenizer),
    )
    if config.adapter.kind == "none":
        refuse_base(folder, config.model, base)
        whole = replace(run, sources=(OrbaxSource.open(params, table.MODEL, config.model, of_run=True),))
        # A run that has kept them needs nothing of where it started, which may be a model of fewer tokens.
        start = None if run.hf and run.tokenizer else _open_if_folder(config.init, config.model)
        return inherit_files(whole, start) if start else whole
    if not config.init:
        raise ValueError(f"{folder} trained an adapter on random weights, which nothing holds; train it with init set")
    rows = table.table_rows(config.adapter, config.model.layers)
    open_source = partial(OrbaxSource.open, params, rows, of_run=True)
    base = _prefer_weights(base, config.init, config.model) or _open_start(folder, config)
    return attach_base(run, base, open_source, config.init)


def _open_start(run: Path, config: configs.Config) -> Checkpoint:
    """The model on which a run trained its adapter, which may be named relative to where training was started."""
    try:
        return open_checkpoint(config.init, model=config.model)
    except (ValueError, OSError) as error:
        if Path(config.init).expanduser().exists() or Path(config.init).is_absolute():
            raise
        raise ValueError(
            f"{run} trained an adapter on init {config.init}, which was not found from {Path.cwd()}: {error}. If "
            "that is a folder, run this where training was started, or name the model, and give the run as --adapter"
        ) from error


def _is_megatron(folder: Path) -> bool:
    return megatron.iteration_folder(folder) is not None


def _open_megatron(folder: Path, base: Checkpoint | None) -> Checkpoint:
    iteration = megatron.iteration_folder(folder)
    assert iteration is not None
    opened = megatron.open_folder(iteration)
    run_path = iteration / "run_config.yaml"
    run = megatron_config.read_yaml(run_path) if run_path.is_file() else None
    model = _megatron_model(folder, opened, run, base)
    if opened.args:
        megatron_config.check_args(opened.args, model, iteration)
    tokenizer = iteration / "tokenizer" if run else folder / "context" / "nemo_tokenizer"
    empty = Checkpoint(
        format="megatron",
        path=folder,
        model=model,
        tokenizer=tokenizer_folder(tokenizer),
        generation=generation_file(tokenizer),
        layout=opened.layout
        + ("" if not run else " at TP {} and PP {}".format(*megatron_config.parallel_sizes(run, run_path))),
        notes=(f"not read, as it is no weight: {', '.join(opened.ignored)}",) if opened.ignored else (),
    )
    if megatron_adapters.is_adapter(opened):
        return _open_megatron_adapter(empty, opened, run, base)
    tensors = megatron.model_tensors(opened, model)
    source = TensorSource.open(iteration, tensors, table.MODEL, model)
    table.check_tied_head(tensors.shapes, tensors.read, iteration)
    whole = replace(empty, sources=(source,))
    return inherit_files(whole, base) if base else whole


def _megatron_model(
    folder: Path, opened: megatron.Opened, run: dict[str, Any] | None, base: Checkpoint | None
) -> ModelConfig:
    """The config that was given with a base, or else that of run_config.yaml. Raises ValueError unless they agree."""
    run_path = opened.folder / "run_config.yaml"
    given = base.model if base else None
    stated = megatron_config.model_config(run, run_path) if run else given
    if stated:
        # The base of an adapter has weights, and only its config is compared.
        compared = replace(base, sources=()) if base and megatron_adapters.is_adapter(opened) else base
        refuse_base(run_path if run else opened.folder, stated, compared)
    model = given or stated
    if model is None:
        raise ValueError(
            f"{folder} does not say its config (there is no {run_path.name}); give --hf-config, a folder with the "
            "model's config.json or its Hub id"
        )
    return model


def _open_megatron_adapter(
    empty: Checkpoint, opened: megatron.Opened, run: dict[str, Any] | None, base: Checkpoint | None
) -> Checkpoint:
    run_path = opened.folder / "run_config.yaml"
    if run is None:
        raise ValueError(
            f"{opened.folder} holds an adapter, and no {run_path.name} that says its scale; copy that file too"
        )
    tensor_ranks, _ = megatron_config.parallel_sizes(run, run_path)
    fusings, projections = megatron_adapters.adapter_fusings(opened)
    adapter = megatron_config.adapter_config(run, projections, run_path)

    def open_source(model: ModelConfig) -> Source:
        tensors = megatron_adapters.adapter_tensors(replace(opened, ranks=tensor_ranks), fusings, adapter, model)
        return TensorSource.open(opened.folder, tensors, table.table_rows(adapter, model.layers), model)

    notes = empty.notes
    if adapter.unmergeable_targets:
        notes += (
            f"its {' and '.join(adapter.unmergeable_targets)} act after the post-norm, as Megatron-Bridge trains "
            "them and PEFT does not (adapter.after_norm)",
        )
    adapted = replace(empty, adapter=adapter, notes=notes)
    names = megatron_config.base_names(run)
    base_name = next(filter(_is_folder, names), names[-1] if names else None)
    return attach_base(adapted, _prefer_weights(base, base_name), open_source, base_name)


def _is_gguf(path: Path) -> bool:
    return gguf.model_file(path) is not None


def _open_gguf(path: Path, base: Checkpoint | None) -> Checkpoint:
    file_path = gguf.model_file(path)
    assert file_path is not None
    file = open_file(file_path)
    gguf.check_kind(file)
    empty = Checkpoint(format="gguf", path=path, layout=gguf.describe_types(file), notes=gguf.quantized_notes(file))
    if file.metadata.get("general.type") == "adapter":
        adapter, base_name = gguf.adapter_config(file)

        def open_source(model: ModelConfig) -> Source:
            rows = gguf.rename_rows(table.table_rows(adapter, model.layers))
            return TensorSource.open(file_path, Tensors(file.tensors), rows, model)

        base = _prefer_weights(base, base_name)
        return attach_base(replace(empty, adapter=adapter), base, open_source, base_name)
    model = gguf.model_config(file)
    refuse_base(file_path, model, base)
    tokenizer = file_path if gguf_tokenizer.has_tokenizer(file) else tokenizer_folder(path)
    whole = replace(
        empty,
        model=model,
        hf=gguf_tokenizer.special_ids(file),
        tokenizer=tokenizer,
        sources=(TensorSource.open(file_path, gguf.model_tensors(file), gguf.MODEL, model),),
    )
    whole = inherit_files(whole, base) if base else whole
    return whole if whole.tokenizer else replace(whole, notes=(*whole.notes, *gguf_tokenizer.missing_notes(file)))


# Tried in this order; a folder has the first format that its files fit.
_FORMATS: tuple[tuple[Callable[[Path], bool], Callable[[Path, Checkpoint | None], Checkpoint]], ...] = (
    (_is_orbax, _open_orbax),
    (_is_run, _open_run),
    (_is_huggingface, _open_huggingface),
    (peft.is_adapter, _open_peft),
    (_is_megatron, _open_megatron),
    (_is_gguf, _open_gguf),
    (_is_deepmind, _open_deepmind),
)


def _open_config(folder: Path) -> Checkpoint:
    """A checkpoint without arrays: the config.json and the tokenizer of a folder."""
    hf = read_json(folder / "config.json")
    return Checkpoint(
        format="huggingface",
        path=folder,
        model=model_config(hf, folder / "config.json"),
        hf=hf,
        tokenizer=tokenizer_folder(folder),
        generation=generation_file(folder),
    )


def _prefer_weights(base: Checkpoint | None, name: str | None, model: ModelConfig | None = None) -> Checkpoint | None:
    """The model of an adapter: the one given; or where that is a config alone, the one that is named if it is there.

    Raises ValueError where that is of another config than the one given.
    """
    if base is not None and base.sources:
        return base
    found = _open_if_folder(name, model)
    if found is None or found.model is None:
        return base
    refuse_base(found.path, found.model, base)
    return found


def _check_base_name(adapter: Path, name: Any) -> str | None:
    """The model that an adapter names. Raises ValueError where that cannot be a folder or a Hub id."""
    if not isinstance(name, str | None):
        raise ValueError(f"{adapter} names {reprlib.repr(name)} as its model, which is no folder or Hub id")
    return name


def _open_if_folder(name: str | None, model: ModelConfig | None = None) -> Checkpoint | None:
    return open_checkpoint(name, model=model) if name and _is_folder(name) else None


def _is_folder(name: str) -> bool:
    """Whether it is a folder, or a GGUF file, which stands for one."""
    return os.path.isdir(name) or (os.path.isfile(name) and _is_gguf(Path(name)))  # Path refuses long names


def locate_folder(path: str | Path, *, weights: bool = True) -> Path:
    """The folder that `path` means. A Hub id's files are downloaded, with the weights or without.

    Raises ValueError where there is no such folder and no such model.
    """
    if not isinstance(path, str | Path):
        raise ValueError(f"the path of a checkpoint is {path!r}; give a string or a Path")
    if not str(path):
        raise ValueError("the path of a checkpoint is empty; name its folder ('.' is the current one)")
    folder = expand_path(path)
    if folder.is_dir():
        return folder
    if folder.is_file() and folder.suffix == ".gguf":
        return folder
    if folder.exists():
        recognition.refuse_foreign(folder)
        raise ValueError(f"{path} is a file; name the folder that holds it, {folder.parent}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise ValueError(f"there is no folder {path}{_suggest_folder(path)}")
    try:
        return hub.download(str(path), weights=weights)
    except ValueError as error:
        raise ValueError(f"{error}{_suggest_folder(path)}") from error


def _suggest_folder(path: str | Path) -> str:
    """ "; did you mean FOLDER?" with the folder beside it that is spelled most like it; empty where none is."""
    place = Path(path)
    try:
        names = [entry.name for entry in expand_path(path).parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    return suggest(str(place), [str(place.parent / name) for name in names], cutoff=0.8)
