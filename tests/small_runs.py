"""Training runs small enough for tests, as commands and as the folders that they leave."""

import ast
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax import config_text, recipes
from gemma2_jax.config import Config
from gemma2_jax.data import python_docs
from gemma2_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]


def small(name: str, workdir: Path, **changes) -> Config:
    """The tiny recipe with few documents, short rows and two narrow layers, random weights, on all eight devices."""
    recipe = recipes.load_recipe(name)
    return replace(
        recipe,
        model=replace(recipe.model, layers=2, width=48, mlp_width=128),
        data=replace(
            recipe.data, train="tests/fixtures/sums.jsonl", tokenizer="assets/tiny-gemma2", eval_fraction=0.05
        ),
        adapter=recipe.adapter
        if recipe.adapter.kind == "none"
        else replace(recipe.adapter, dropout=0.0, targets=("attn/q", "mlp/down")),  # programs are shorter
        optim=replace(recipe.optim, decay_steps=20),  # the same program whatever the steps
        train=replace(
            recipe.train,
            sequence_length=64,
            global_batch_size=8,
            micro_batch_size=1,
            eval_batches=1,
            eval_every=10,
            checkpoint_every=5,
        ),
        **{"init": "", "workdir": str(workdir), "steps": 10} | changes,
    )


def command(name: str, config: Config) -> list[str]:
    """The command line that gives this config."""
    recipe = dict(line.split(" = ", 1) for line in config_text.to_text(recipes.load_recipe(name)).splitlines())
    lines = dict(line.split(" = ", 1) for line in config_text.to_text(config).splitlines())
    changed: list[str] = []
    for key, value in lines.items():
        if recipe[key] != value:
            several = value.startswith("(")
            changed += [f"--{key}", *ast.literal_eval(value)] if several else [f"{key}={value.strip(chr(39))}"]
    return [sys.executable, "-m", "gemma2_jax.train", "--config", name, *changed]


def shorten_python_docs(patch: pytest.MonkeyPatch) -> None:
    """Has `python-docs` be its first 300 conversations."""
    few = dict(itertools.islice(python_docs.python_instructions().items(), 300))
    patch.setattr(python_docs, "python_instructions", lambda: few)


def lines_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved_run(workdir: Path, config: Config, steps: dict[int, dict[str, np.ndarray]]) -> Path:
    """A training run's folder as training leaves it."""
    workdir.mkdir()
    (workdir / "config.txt").write_text(config_text.to_text(config))
    with Checkpoints(workdir, keep=3) as checkpoints:
        for step, params in steps.items():
            identity = {"rows": 9, "length": 64, "tokens": 99, "batch_size": 8}
            position = {"step": step, "data": {"batches": {"next_index": step}, "of": identity}}
            arrays = {path: jnp.asarray(w) for path, w in params.items()}
            checkpoints.save(step, arrays, {"count": jnp.zeros(())}, position)
    return workdir
