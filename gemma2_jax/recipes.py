"""Recipes: a function per kind of run that fills in Megatron-Bridge's defaults, and the files that hold one each.

A recipe (`configs/NAME.py`) is a function `config()` that returns a `Config`; `load_recipe` finds it by name or path.
Nothing here needs JAX.
"""

import difflib
import importlib.util
import os
from pathlib import Path
from typing import Any, Literal

from gemma2_jax.config import Config, DataConfig, OptimConfig, TrainConfig
from gemma2_jax.model_config import AdapterConfig, ModelConfig


def default_workdir(name: str) -> str:
    """Where a run of that name is written if no workdir is given: in the folder that SAVE_DIR names, else in runs."""
    return str(Path(os.environ.get("SAVE_DIR") or "runs") / name)


def pretrain(name: str, model: ModelConfig, **changes) -> Config:
    """A pretraining run from random weights in `default_workdir(NAME)`, with Megatron-Bridge's defaults for Gemma 2."""
    defaults: dict[str, Any] = dict(
        data=DataConfig(kind="text"),
        optim=OptimConfig(lr=3e-4, min_lr=3e-5, warmup_steps=500),
        train=TrainConfig(
            sequence_length=4096,
            global_batch_size=32,
            micro_batch_size=2,
            seed=1234,
            eval_every=500,
            eval_batches=32,
            checkpoint_every=500,
        ),
        steps=300_000,
    )
    return Config(**({"workdir": default_workdir(name), "model": model} | defaults | changes))


def finetune(name: str, model: ModelConfig, init: str, kind: Literal["sft", "lora", "dora"], **changes) -> Config:
    """A fine-tuning run from given weights in `default_workdir(NAME)`, with Megatron-Bridge's defaults for Gemma 2."""
    if kind == "sft":
        adapter, lr = AdapterConfig(), 5e-6
    else:
        adapter, lr = AdapterConfig(kind=kind, rank=32, alpha=64.0 if kind == "dora" else 32.0), 1e-4
    defaults: dict[str, Any] = dict(
        adapter=adapter,
        data=DataConfig(kind="instructions", seed=5678),
        optim=OptimConfig(lr=lr, warmup_steps=10),
        steps=100,
    )
    return Config(**({"workdir": default_workdir(name), "model": model, "init": init} | defaults | changes))


def recipe_names() -> list[str]:
    """Names that `load_recipe` knows."""
    return sorted(path.stem for path in _recipe_folder().glob("*.py") if path.stem != "__init__")


def load_recipe(name: str) -> Config:
    """The recipe of that name, or the one in that Python file, whose `config()` is called."""
    path = Path(name) if name.endswith(".py") else _recipe_folder() / f"{name}.py"
    if not path.is_file():
        near = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(
            f"there is no recipe {name!r}{hint} There are {', '.join(recipe_names())}; a Python file with a function "
            "config() is one too"
        )
    spec = importlib.util.spec_from_file_location(f"gemma2_jax.configs.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "config", None)):
        raise ValueError(f"{path} has no function config(); a recipe is a function config() that returns a Config")
    return module.config()


def _recipe_folder() -> Path:
    spec = importlib.util.find_spec("gemma2_jax.configs")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))
