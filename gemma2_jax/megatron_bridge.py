"""Megatron-Bridge's names for Gemma 2, so that its commands and scripts carry over with only a module's name changed.

    from gemma2_jax.megatron_bridge import AutoBridge, gemma2_9b_finetune_config
    python -m gemma2_jax.train --recipe gemma2_9b_finetune_config --peft lora train.train_iters=1000

Nothing is computed here: each name becomes one of ours, and a line on standard error says which. Where torchrun starts
a process per GPU, one process here drives all GPUs of a host. `import` and `export` stand in `convert.__main__`.
"""

import ast
import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma2_jax import api, recipes
from gemma2_jax.config import Config

if TYPE_CHECKING:
    from gemma2_jax.inference.loaded import LoadedModel

# Arguments of Megatron-Bridge's recipes, and the field of `Config` that each becomes.
_ARGUMENTS = {
    **dict.fromkeys(("data_paths", "train_data_path"), "data.train"),
    "valid_data_path": "data.eval",
    "train_iters": "steps",
    "global_batch_size": "train.global_batch_size",
    "micro_batch_size": "train.micro_batch_size",
    "seq_length": "train.sequence_length",
    "lr": "optim.lr",
    "finetune_lr": "optim.lr",
    "min_lr": "optim.min_lr",
    "lr_warmup_iters": "optim.warmup_steps",
    "lr_decay_iters": "optim.decay_steps",
    "eval_interval": "train.eval_every",
    "save_interval": "train.checkpoint_every",
    "log_interval": "train.log_every",
    "wandb_project": "train.wandb",
    "pretrained_checkpoint": "init",
    "packed_sequence": "data.packing",
    **dict.fromkeys(("tensor_model_parallel_size", "tensor_parallelism"), "mesh.tensor"),
    **dict.fromkeys(("pipeline_model_parallel_size", "pipeline_parallelism"), "mesh.stage"),
    **dict.fromkeys(("context_parallel_size", "context_parallelism"), "mesh.context"),
}
_OWN_ARGUMENTS = ("name", "dir", "peft")  # which decide the recipe and the working directory

# Fields of Megatron-Bridge's configuration as `group.field=value` on its command line.
_FIELDS = {
    "train.train_iters": "steps",
    "train.global_batch_size": "train.global_batch_size",
    "train.micro_batch_size": "train.micro_batch_size",
    "train.eval_interval": "train.eval_every",
    "train.eval_iters": "train.eval_batches",
    "model.seq_length": "train.sequence_length",
    "dataset.seq_length": "train.sequence_length",
    **dict.fromkeys(("dataset.data_path", "dataset.blend"), "data.train"),
    "dataset.split": "data.split_shares",
    "dataset.random_seed": "data.seed",
    "model.tensor_model_parallel_size": "mesh.tensor",
    "model.pipeline_model_parallel_size": "mesh.stage",
    "model.context_parallel_size": "mesh.context",
    "optimizer.lr": "optim.lr",
    "optimizer.min_lr": "optim.min_lr",
    "optimizer.weight_decay": "optim.weight_decay",
    "optimizer.adam_beta1": "optim.b1",
    "optimizer.adam_beta2": "optim.b2",
    "optimizer.adam_eps": "optim.eps",
    "optimizer.clip_grad": "optim.clip_norm",
    "scheduler.lr_warmup_iters": "optim.warmup_steps",
    "scheduler.lr_decay_iters": "optim.decay_steps",
    "checkpoint.save": "workdir",
    "checkpoint.save_interval": "train.checkpoint_every",
    "checkpoint.pretrained_checkpoint": "init",
    "logger.log_interval": "train.log_every",
    "logger.wandb_project": "train.wandb",
    "peft.dim": "adapter.rank",
    "peft.alpha": "adapter.alpha",
    "peft.dropout": "adapter.dropout",
    "rng.seed": "train.seed",
}
_OUR_GROUPS = ("train", "model")  # groups of both configurations, whose other fields are ours
_PEFT = {"none": "sft", "lora": "lora", "dora": "dora"}
_SIZES = ("2b", "9b", "27b")
_RECIPES = {f"gemma2_{size}_{stage}_config": (size, stage) for stage in ("pretrain", "finetune") for size in _SIZES}


def _say(asked: str, meaning: str) -> None:
    print(f"{asked} becomes {meaning}", file=sys.stderr)


def _recipe_name(function: str, peft: str | None) -> str:
    """Our recipe for one of Megatron-Bridge's. Raises ValueError for a name or an adapter that there is not."""
    if function not in _RECIPES:
        near = difflib.get_close_matches(function, _RECIPES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"there is no recipe {function}; {hint}Megatron-Bridge's are {', '.join(_RECIPES)}; ours are named with "
            "--config"
        )
    size, stage = _RECIPES[function]
    if stage == "pretrain":
        if peft not in (None, "none"):
            raise ValueError(f"{function} trains all weights, and peft is {peft}; use gemma2_{size}_finetune_config")
        return f"{size}_pretrain"
    if peft is not None and peft not in _PEFT:
        raise ValueError(f"peft is {peft}; it may be lora, dora or none")
    return f"{size}_{_PEFT[peft or 'none']}"


def _nest_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """{"train.seed": 1} as {"train": {"seed": 1}}."""
    nested: dict[str, Any] = {}
    for name, value in fields.items():
        group, _, field = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[field] = value
    return nested


def _make_recipe(function: str) -> Callable[..., Config]:
    finetunes = _RECIPES[function][1] == "finetune"
    accepted = [*_OWN_ARGUMENTS[: 3 if finetunes else 2], *_ARGUMENTS]

    def config(**arguments: Any) -> Config:
        arguments = {name: value for name, value in arguments.items() if value is not None or name == "peft"}
        if not arguments.pop("sequence_parallel", True):
            raise ValueError("sequence_parallel is False; here it is part of tensor parallelism, always on")
        for name in arguments:
            if name not in accepted:
                near = difflib.get_close_matches(name, accepted, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(f"{function} takes no {name} here; {hint}It takes {', '.join(accepted)}")
        recipe = _recipe_name(function, arguments.get("peft", "lora") if finetunes else None)
        fields = {_ARGUMENTS[name]: value for name, value in arguments.items() if name in _ARGUMENTS}
        for name in ("data.train", "data.eval"):
            if name in fields:
                fields[name] = _join_paths(fields[name])
        fields = _megatron_order(fields) | fields
        if "name" in arguments or "dir" in arguments:
            folder, name = arguments.get("dir"), arguments.get("name", recipe)
            fields["workdir"] = f"{folder}/{name}" if folder else recipes.default_workdir(name)
        changes = "".join(f", {name}={value!r}" for name, value in fields.items())
        _say(function, f"recipe({recipe!r}{changes})")
        return api.recipe(recipe, **_nest_fields(fields))

    config.__name__ = config.__qualname__ = function
    config.__doc__ = f"""Megatron-Bridge's {function}: a `Config` of ours, for `gemma2_jax.train`.

    Raises ValueError for an argument that has no field here, with those that have: {", ".join(accepted)}.
    """
    return config


def _join_paths(paths: str | list[str] | tuple) -> str:
    """Paths as Megatron writes them, with weights before them or not, as one source: 0.7*a,0.3*b."""
    words = paths.split() if isinstance(paths, str) else [str(path) for path in paths]
    weights, names = words[::2], words[1::2]
    if len(weights) == len(names) and all(map(_is_number, weights)):
        return ",".join(f"{weight}*{name}" for weight, name in zip(weights, names, strict=True))
    return ",".join(words)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_blend(value: str) -> str:
    """The value of dataset.data_path, or of dataset.blend as its command line takes it, as one source."""
    try:
        blend = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return _join_paths(value)
    names, weights = blend if isinstance(blend, list | tuple) and len(blend) == 2 else ((), None)
    if weights is None and names:
        return _join_paths(names)
    if not (isinstance(names, list | tuple) and isinstance(weights, list | tuple) and 0 < len(names) == len(weights)):
        raise ValueError(f"dataset.blend is {value}; it must be paths and their weights, as [['a','b'],[0.7,0.3]]")
    return _join_paths([word for pair in zip(weights, names, strict=True) for word in pair])


def _megatron_order(fields: dict[str, Any]) -> dict[str, Any]:
    """The order and the splits that Megatron-Bridge reads its .bin and .idx files with, where such are named."""
    first = fields.get("data.train", "").partition(",")[0].rpartition("*")[2]
    if not Path(f"{first.removesuffix('.bin').removesuffix('.idx')}.idx").is_file():
        return {}
    return {"data.order": "megatron"} | ({} if "data.eval" in fields else {"data.split_shares": "9999,8,2"})


gemma2_2b_pretrain_config = _make_recipe("gemma2_2b_pretrain_config")
gemma2_9b_pretrain_config = _make_recipe("gemma2_9b_pretrain_config")
gemma2_27b_pretrain_config = _make_recipe("gemma2_27b_pretrain_config")
gemma2_2b_finetune_config = _make_recipe("gemma2_2b_finetune_config")
gemma2_9b_finetune_config = _make_recipe("gemma2_9b_finetune_config")
gemma2_27b_finetune_config = _make_recipe("gemma2_27b_finetune_config")


@dataclass(kw_only=True, slots=True)  # a field that it does not have is an error
class Provider:
    """How a checkpoint is to be spread over devices, set field by field before it is loaded."""

    path: str
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1

    def finalize(self) -> None:
        """Raises ValueError for a size below 1."""
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def provide_distributed_model(self, wrap_with_ddp: bool = False) -> "LoadedModel":
        """The model, sharded over all devices; what it is not split over holds copies.

        Raises ValueError with `wrap_with_ddp`: gradients are summed in the training step here, not by a wrapper.
        """
        if wrap_with_ddp:
            raise ValueError("wrap_with_ddp is True, and no model is wrapped here; train with gemma2_jax.train(config)")
        tensor, stage, context = (
            self.tensor_model_parallel_size,
            self.pipeline_model_parallel_size,
            self.context_parallel_size,
        )
        split = {"tensor": tensor, "stage": stage, "context": context}
        sizes = ", ".join(f"{axis}={size}" for axis, size in split.items() if size > 1)
        _say("provide_distributed_model", f"gemma2_jax.load({self.path!r}, mesh=gemma2_jax.mesh({sizes}))")
        return api.load(self.path, mesh=api.mesh(tensor=tensor, stage=stage, context=context))


class AutoBridge:
    """A checkpoint that becomes a sharded model: `gemma2_jax.load` in Megatron-Bridge's three steps."""

    def __init__(self, path: str):
        self.path = path

    @classmethod
    def from_hf_pretrained(cls, path: str) -> "AutoBridge":
        """Names the checkpoint: a Hub id, or a folder of any format."""
        return cls(str(path))

    def to_megatron_provider(self) -> Provider:
        """What the parallel sizes are set on."""
        return Provider(path=self.path)


def translate_arguments(arguments: list[str]) -> list[str]:
    """Arguments of Megatron-Bridge's run_recipe.py as those of `gemma2_jax.train`; without --recipe, as they are.

    Raises ValueError for a recipe or a field that has no counterpart here, with those that have.
    """
    arguments, function = _take_option(arguments, "recipe")
    if function is None:
        return arguments
    _, config = _take_option(arguments, "config")
    if config is not None:
        raise ValueError(f"--recipe {function} and --config {config} both name a recipe; give one of them")
    arguments, peft = _take_option(arguments, "peft")
    if peft is None and function.endswith("_finetune_config"):
        peft = "lora"
    arguments, checkpoint = _take_option(arguments, "pretrained_checkpoint")
    fields: dict[str, str] = {}
    translated = ["--config", _recipe_name(function, peft), *(["--init", checkpoint] if checkpoint else [])]
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        field = _translate_field(name)
        if field == "data.train" and name != field:
            value = _read_blend(value)
        fields[field] = value.strip("\"'") if name == "dataset.split" else value
        translated.append(f"--{field}={fields[field]}" if equals else argument)
    order = _megatron_order(fields)
    translated += [f"--{field}={value}" for field, value in order.items() if field not in fields]
    _say(f"--recipe {function}", " ".join(translated))
    return translated


def _translate_field(name: str) -> str:
    """Our field for one of Megatron-Bridge's, or for one of ours. Raises ValueError where it is neither."""
    group = name.partition(".")[0]
    known = [field for field in _FIELDS if field.startswith(f"{group}.")]
    if name not in _FIELDS and known and group not in _OUR_GROUPS:
        raise ValueError(f"{name} has no counterpart here; of {group} these have: {', '.join(known)}")
    return _FIELDS.get(name, name)


def translate_generate_arguments(arguments: list[str]) -> list[str]:
    """Arguments of Megatron-Bridge's hf_to_megatron_generate_text.py as those of `gemma2_jax.generate`."""
    arguments, model = _take_option(arguments, "hf_model_path")
    arguments, megatron = _take_option(arguments, "megatron_model_path")
    if megatron:
        translated = ["--checkpoint", megatron, *(["--hf-config", model] if model else [])]
    elif model:
        translated = ["--checkpoint", model]
    else:
        return arguments
    names = {"--hf_model_path": model, "--megatron_model_path": megatron}
    _say(" with ".join(name for name, value in names.items() if value), " ".join(translated))
    return [*translated, *arguments]


def _take_option(arguments: list[str], name: str) -> tuple[list[str], str | None]:
    """The arguments without the option --name, written with - or _, and its value."""
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option.startswith("--") and option[2:].replace("-", "_") == name:
            if equals:
                return [*arguments[:place], *arguments[place + 1 :]], value
            if place + 1 < len(arguments):
                return [*arguments[:place], *arguments[place + 2 :]], arguments[place + 1]
    return arguments, None
