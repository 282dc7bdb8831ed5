"""Where a run starts: its own newest checkpoint, else the weights it was given, else random ones."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from gemma2_jax import config as configs
from gemma2_jax.cluster import hosts
from gemma2_jax.config import AdapterConfig, Config
from gemma2_jax.convert import checkpoints as formats
from gemma2_jax.convert.files.folder import copy_tokenizer
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.formats.hf_config import hf_config
from gemma2_jax.data.batches import load_tokenizer
from gemma2_jax.model.gemma2 import Weights
from gemma2_jax.training.checkpoint import Checkpoints
from gemma2_jax.training.metrics import truncate_metrics
from gemma2_jax.training.step import Program, State

# A run may go on with other values of these; a change of anything else would make it another run.
FREE = ("train.log_every", "train.eval_every", "train.eval_batches", "train.checkpoint_every", "profile.", "mesh.")
FREE += ("train.keep_checkpoints", "train.micro_batch_size", "steps", "workdir", "compute.attention", "compute.remat")
FREE += ("compute.loss_chunk", "compute.gpu_flags", "train.wandb", "train.export_adapter")


def open_source(config: Config) -> formats.Checkpoint | None:
    """What `init` and `init_adapter` name as one checkpoint, or None for random weights.

    Raises ValueError where it is of another model, or has another adapter than the run trains.
    """
    if not config.init:
        return None
    source = formats.open_checkpoint(config.init, model=config.model)
    if source.model is None or not source.sources or "embedding" not in source.shapes:
        raise ValueError(
            f"init {config.init} is an adapter without a model; give the model it belongs to as --init, and to go on "
            "training it, this as --adapter"
        )
    if source.adapter.kind != "none":
        model = f"its model, {source.base}," if source.base else "its model"
        remedy = f"give {model} as --init and the adapter alone as --adapter to go on training it"
        if not source.adapter.unmergeable_targets:  # else nothing can
            remedy += f", or merge it first with python -m gemma2_jax.convert {config.init} MERGED --to orbax --merge"
        raise ValueError(f"init {config.init} has a {source.adapter.kind} adapter; {remedy}")
    for field in dataclasses.fields(config.model):
        ours, theirs = getattr(config.model, field.name), getattr(source.model, field.name)
        if ours != theirs and field.name != "max_length":
            raise ValueError(
                f"init {config.init} is a checkpoint of another model: its {field.name} is {theirs}, and "
                f"model.{field.name} is {ours}; choose the recipe of that model, or set model.{field.name}"
            )
    if config.init_adapter:
        source = formats.open_checkpoint(config.init_adapter, base=source)
        _check_adapter(config, source.adapter)
    return source


def _check_adapter(config: Config, theirs: AdapterConfig) -> None:
    """Raises ValueError unless the run trains such an adapter. Dropout may differ: it is not part of the weights."""

    def fields(adapter: AdapterConfig) -> dict:
        projections = table.match_targets(dataclasses.replace(adapter, kind=theirs.kind))
        return dataclasses.asdict(adapter) | {"targets": " ".join(projections)}

    ours, have = fields(config.adapter), fields(theirs)
    others = [name for name in have if name != "dropout" and ours[name] != have[name]]
    if others:
        raise ValueError(
            f"the adapter {config.init_adapter} is not such as this run trains: "
            + "; ".join(f"it has {name} {have[name]}, and adapter.{name} is {ours[name]}" for name in others)
            + f"; give {' '.join(f'--adapter.{name} {have[name]}' for name in others)}"
        )


def claim_workdir(config: Config, latest: int | None) -> list[str]:
    """Writes config.txt, or holds the config against the one there; ValueError where it is another run's.

    Returns what has changed and may, as sentences. Process 0 does it, and the others find what it wrote.
    """
    path = config.output / "config.txt"
    with hosts.process_zero_first("claim_workdir"):
        if jax.process_index() == 0:
            return _claim_as_process_zero(config, path, latest)
        _check_same_run(config, path)
        return []


def _claim_as_process_zero(config: Config, path: Path, latest: int | None) -> list[str]:
    changes = {}
    if latest is not None and path.exists():
        changes = config_differences(config, path)
        others = "; ".join(text for key, text in changes.items() if not key.startswith(FREE))
        if others:
            raise ValueError(
                f"{config.output} holds another run: {others}. Give another --workdir, or that run's values"
            )
        if "steps" in changes and config.optim.decay_steps is None:
            changes["steps"] += ", which the learning rate follows from here on (optim.decay_steps would fix it)"
    truncate_metrics(config.output / "metrics.jsonl", -1 if latest is None else latest)
    beside = path.with_suffix(".tmp")
    beside.write_text(configs.to_text(config))
    beside.replace(path)
    return list(changes.values())


def _check_same_run(config: Config, path: Path) -> None:
    if not path.exists():
        raise ValueError(
            f"{config.output.absolute()} is not the folder that process 0 writes to; "
            "give a --workdir that all hosts share"
        )
    if differences := config_differences(config, path):
        raise ValueError(
            f"process {jax.process_index()} was not started like process 0: {'; '.join(differences.values())}; "
            "give all of them the same options"
        )


def config_differences(config: Config, path: Path) -> dict[str, str]:
    """How the config differs from the one in a file, by field; where the run is carried out is left out."""
    # Through a config, so that a field that the program had not got then has its default.
    then = configs.from_text(path.read_text(), str(path))
    before, now = (_lines(configs.to_text(config)) for config in (then, config))
    return {
        key: f"{key} was {before[key]} and is {now[key]}"
        for key in now
        if before[key] != now[key] and not key.startswith("hosts.")
    }


def _lines(text: str) -> dict[str, str]:
    return dict(line.split(" = ", 1) for line in text.splitlines())


def keep_tokenizer(config: Config, source: formats.Checkpoint | None):
    """The run's tokenizer, kept with a config.json under WORKDIR/tokenizer so that the run stands on its own."""
    folder = config.data.tokenizer or (source and source.tokenizer)
    if not folder:
        raise ValueError("no tokenizer: init has none beside its weights, so set data.tokenizer to a folder or hub id")
    tokenizer = load_tokenizer(str(folder))
    if len(tokenizer) > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has {len(tokenizer)} entries and the model {config.model.vocab_size}; "
            "use the model's own tokenizer"
        )
    if jax.process_index() != 0:
        return tokenizer
    kept = config.output / "tokenizer"
    dtype = config.compute.trained_dtype if config.adapter.kind == "none" else config.compute.frozen_dtype
    original = source.hf if source else None
    kept.mkdir(exist_ok=True)
    if source and source.tokenizer:
        copy_tokenizer(source.tokenizer, kept)
    tokenizer.save_pretrained(kept)
    (kept / "config.json").write_text(json.dumps(hf_config(config.model, dtype, original), indent=2) + "\n")
    return tokenizer


def start_state(
    program: Program, source: formats.Checkpoint | None, checkpoints: Checkpoints
) -> tuple[State, dict | None]:
    """The state to go on from, and what the loop saved with it if it is the run's own."""
    # This run's own checkpoint comes first, then the weights given, then random ones.
    latest = checkpoints.latest
    if latest is None:
        state = program.initial_state(load_base(program, source))
        if program.config.init_adapter:
            assert source is not None
            state = dataclasses.replace(state, params=formats.load_weights(source, program.params))
        return state, None
    params, optimizer, loop = checkpoints.restore(latest, program.params, program.state.optimizer)
    frozen = load_base(program, source) if program.frozen else {}
    step = jax.device_put(np.int32(latest), program.state.step.sharding)
    return State(step=step, params=params, frozen=frozen, optimizer=optimizer), loop


def load_base(program: Program, source: formats.Checkpoint | None) -> Weights:
    """The model's weights, trained or frozen, before any step."""
    return formats.load_weights(source, program.base) if source else program.random_base()
