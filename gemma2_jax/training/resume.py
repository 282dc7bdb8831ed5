"""Where a run starts: its own newest checkpoint, else the weights it was given, else random ones."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma2_jax import config_text
from gemma2_jax.cluster import hosts
from gemma2_jax.config import Config
from gemma2_jax.convert.checkpoints import Checkpoint, load_weights
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.data.batches import Batches
from gemma2_jax.model.gemma2 import Weights
from gemma2_jax.model_config import AdapterConfig, list_patterns, weight_name
from gemma2_jax.training.best import BestLoss
from gemma2_jax.training.checkpoint import Checkpoints
from gemma2_jax.training.guard import Guard, no_history
from gemma2_jax.training.step import Program, State
from gemma2_jax.training.trackers import truncate_metrics

# A run may go on with other values of the fields that begin like this; any other change would make it another run.
FREE_FIELDS = ("train.log_every", "train.eval_every", "train.eval_batches", "train.checkpoint_every", "profile.")
FREE_FIELDS += ("train.keep_", "train.micro_batch_size", "train.export_adapter", "mesh.")
FREE_FIELDS += ("train.tensorboard", "train.wandb", "train.mlflow", "guard.", "sample.", "train.save_deadline")
FREE_FIELDS += ("train.patience", "train.export_best", "train.stop_after", "train.upload")
FREE_FIELDS += ("compute.attention", "compute.remat", "compute.kept_outputs", "compute.loss_chunk", "compute.gpu_flags")
FREE_FIELDS += ("compute.tune_kernels",)
FREE_FIELDS += ("steps", "workdir")


def open_source(config: Config) -> Checkpoint | None:
    """What `init` and `init_adapter` name as one checkpoint, or None for random weights.

    Raises ValueError if it is of another model, or its adapter is not of the kind that the run trains.
    """
    if not config.init:
        return None
    source = open_checkpoint(config.init, model=config.model)
    if source.model is None or not source.has_weights:
        raise ValueError(
            f"init {config.init} is an adapter without a model; give the model it belongs to as --init, and to go on "
            "training it, this as --adapter"
        )
    if source.adapter.kind != "none":
        model = f"its model, {source.base}," if source.base else "its model"
        remedy = f"give {model} as --init and the adapter alone as --adapter to go on training it"
        if not source.adapter.unmergeable_targets:
            remedy += f", or merge it first with python -m gemma2_jax.convert {config.init} MERGED --to orbax --merge"
        kind = {"lora": "LoRA", "dora": "DoRA"}[source.adapter.kind]
        raise ValueError(f"init {config.init} has a {kind} on it; {remedy}")
    for field in dataclasses.fields(config.model):
        configured, stored = getattr(config.model, field.name), getattr(source.model, field.name)
        grows = field.name == "vocab_size" and configured > stored  # which `tokenizer.grow_vocabulary` decides
        if configured != stored and field.name != "max_length" and not grows:
            raise ValueError(
                f"init {config.init} is a checkpoint of another model: its {field.name} is {stored}, and "
                f"model.{field.name} is {configured}; choose the recipe of that model, or give --model.{field.name} "
                f"{stored}"
            )
    if config.init_adapter:
        source = open_checkpoint(config.init_adapter, base=source)
        _check_vocabulary(config, source)  # first, as there the remedy is another
        _check_adapter(config, source.adapter)
    return source


def _check_adapter(config: Config, adapter: AdapterConfig) -> None:
    """Raises ValueError unless the run trains such an adapter. Dropout may differ: it is not part of the weights."""

    layer_count = config.model.layers

    def comparable_fields(config: AdapterConfig) -> dict[str, Any]:
        config = dataclasses.replace(config, kind=adapter.kind)
        projections = table.match_targets(config)
        layers = config.layers or range(layer_count)
        ranks = {name: {layer: config.layer_rank(name, layer) for layer in layers} for name in projections}
        alphas = {name: {layer: config.layer_alpha(name, layer) for layer in layers} for name in projections}
        return dataclasses.asdict(config) | {
            "targets": tuple(projections),
            "rank_pattern": list_patterns(ranks, config.rank),
            "alpha_pattern": list_patterns(alphas, config.alpha),
            "modules_to_save": tuple(weight_name(row.path) for row in table.MODEL if config.replaces(row.path)),
        }

    configured, stored = comparable_fields(config.adapter), comparable_fields(adapter)
    configured["kind"] = config.adapter.kind
    different = [name for name in stored if name != "dropout" and configured[name] != stored[name]]
    if different:
        values = [[_write_value(fields[name]) or "none" for fields in (stored, configured)] for name in different]
        facts = (
            f"it has {name} {value}, and adapter.{name} is {other}"
            for name, (value, other) in zip(different, values, strict=True)
        )
        raise ValueError(
            f"the adapter {config.init_adapter} is not of the kind that this run trains: {'; '.join(facts)}; "
            f"give {' '.join(f'--adapter.{name} {_write_value(stored[name])}'.rstrip() for name in different)}"
        )


def _write_value(value: Any) -> str:
    """A value as an option takes it: those of a tuple one after another."""
    return " ".join(map(_write_value, value)) if isinstance(value, tuple) else str(value)


def _check_vocabulary(config: Config, source: Checkpoint) -> None:
    """Raises ValueError if the adapter to start from has added tokens to the vocabulary of its model."""
    assert source.model is not None
    if source.model.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"the adapter {config.init_adapter} has grown the vocabulary to {source.model.vocab_size} tokens, and the "
            f"model {config.init} has {config.model.vocab_size}; merge it first with python -m gemma2_jax.convert "
            f"{config.init} MERGED --adapter {config.init_adapter} --merge --to orbax, and train on MERGED with "
            f"--model.vocab_size {source.model.vocab_size}"
        )


def claim_workdir(config: Config, latest: int | None) -> list[str]:
    """Compares the config with config.txt in the folder, and writes it there.

    Returns what changed, as sentences. Raises ValueError if the folder holds another run. Process 0 writes, and the
    others check what it wrote. Nothing is written if the run has taken more steps than the config asks for.
    """
    path = config.output / "config.txt"
    with hosts.process_zero_first("claim_workdir"):
        if jax.process_index() == 0:
            changes = _check_changes(config, path) if latest is not None and path.exists() else []
            if latest is None or latest <= config.steps:
                _write_config(config, path)
                for name in ("metrics.jsonl", "skipped.jsonl"):
                    truncate_metrics(config.output / name, -1 if latest is None else latest)
            return changes
        if latest is None or latest <= config.steps:
            _check_same_options(config, path)
        return []


def _check_changes(config: Config, path: Path) -> list[str]:
    """How the config differs from that of the run in the folder; ValueError if that would make it another run."""
    changes = config_differences(config, path)
    forbidden = {key: text for key, text in changes.items() if not key.startswith(FREE_FIELDS)}
    if forbidden:
        saved = config_text.from_file(path)
        remedy = "Give that run's values, or another --workdir"
        if not any(key.startswith(("model.", "adapter.", "init")) for key in forbidden):
            remedy += describe_new_start(dataclasses.replace(saved, workdir=config.workdir))
        raise ValueError(f"{config.output} holds another run: {'; '.join(forbidden.values())}. {remedy}")
    if "steps" in changes and config.optim.decay_steps is None:
        changes["steps"] += ", which the learning rate follows from here on (optim.decay_steps would fix it)"
    return list(changes.values())


def describe_new_start(config: Config) -> str:
    """How to start a new run from the weights of this one, as the last of a list of remedies.

    Empty if the weights are an adapter on random weights, which only the run itself has.
    """
    if config.adapter.kind == "none":
        options = ["--init", config.workdir]
    elif config.init:
        options = ["--init", config.init, "--adapter", config.workdir]
    else:
        return ""
    return f", or start a new run from this one's weights: {shlex.join(options)} --workdir NEW"


def _write_config(config: Config, path: Path) -> None:
    complete = path.with_suffix(".tmp")
    complete.write_text(config_text.to_text(config))
    complete.replace(path)


def _check_same_options(config: Config, path: Path) -> None:
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
    """How the config differs from the one in a file, by field. Fields of `hosts` are not compared."""
    # The file is parsed and written again, so that a field that is newer than the file gets its default.
    saved = config_text.from_file(path)
    same = [name for name in ("init", "init_adapter") if _is_same_folder(getattr(saved, name), getattr(config, name))]
    saved = dataclasses.replace(saved, **{name: getattr(config, name) for name in same})
    before, now = (_config_lines(config) for config in (saved, config))
    return {
        key: f"{key} was {before[key]} and is {now[key]}"
        for key in now
        if before[key] != now[key] and not key.startswith("hosts.")
    }


def _is_same_folder(first: str, second: str) -> bool:
    """Whether two paths name one folder, such as a relative and an absolute one."""
    return bool(first and second) and Path(first).exists() and Path(first).resolve() == Path(second).resolve()


def _config_lines(config: Config) -> dict[str, str]:
    return dict(line.split(" = ", 1) for line in config_text.to_text(config).splitlines())


def start_state(program: Program, source: Checkpoint | None, checkpoints: Checkpoints) -> tuple[State, dict | None]:
    """The state to go on from, and the position that the loop saved with it, or None for a run that starts.

    The state is this run's newest checkpoint if there is one, else the weights given, else random ones. No process
    returns before all have their state, as they act together from then on.
    """
    latest, position = checkpoints.latest, None
    if latest is None:
        state = program.initial_state(load_base(program, source))
        if program.config.init_adapter:
            assert source is not None
            state = dataclasses.replace(state, params=load_weights(source, program.params))
    else:
        params, optimizer, position = checkpoints.restore(latest, program.params, program.state.optimizer)
        frozen = {path: w for path, w in load_base(program, source).items() if path in program.frozen}
        # `device_put` would compare the number between processes, some of which may not have reached this line yet.
        step = jax.make_array_from_callback((), program.state.step.sharding, lambda _: np.int32(latest))
        known = position.get("history", no_history())  # which version 0.1 did not keep
        history = {
            name: jax.make_array_from_callback((), x.sharding, lambda _, name=name: np.float32(known[name]))
            for name, x in program.state.history.items()
        }
        state = State(step=step, params=params, frozen=frozen, optimizer=optimizer, history=history)
    hosts.wait_for_processes("start_state")
    return state, position


def restore_best(config: Config, checkpoints: Checkpoints) -> BestLoss:
    """The best held-out loss as it was when the newest checkpoint was saved."""
    latest = checkpoints.latest
    return BestLoss(config.train.patience, None if latest is None else checkpoints.read_loop(latest).get("best"))


def load_base(program: Program, source: Checkpoint | None) -> Weights:
    """The model's weights, trained or frozen, before any step."""
    return load_weights(source, program.base) if source else program.random_base()


def restore_position(config: Config, batches: Batches, guard: Guard, position: dict | None) -> int:
    """Makes batches and guard go on where the run was. Returns its step; 0 without a position, as the run then starts.

    Raises ValueError if the data is not what it was when the position was saved.
    """
    if position is None:
        return 0
    try:
        batches.set_state(position["data"])
    except (ValueError, IndexError) as error:  # the latter of Grain, of a batch that there is not
        raise ValueError(
            f"the run in {config.output} cannot go on with this data: {error}. Give back the data, the sizes and "
            f"the version of gemma2_jax of that run{describe_new_start(config)}"
        ) from error
    if "guard" in position:  # which version 0.1 did not keep
        guard.set_state(position["guard"])
    return position["step"]
