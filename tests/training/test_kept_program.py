"""The compiled step that a run keeps: it is loaded back, and takes the same step."""

from dataclasses import replace

import jax
import numpy as np
from small_runs import ROOT, small

from gemma2_jax.config import ProfileConfig
from gemma2_jax.mesh import make_mesh
from gemma2_jax.planning.checked_steps import make_batch
from gemma2_jax.training import kept_program, loop
from gemma2_jax.training.step import Program, compile_step


def test_a_kept_program_takes_the_same_step(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = small("tiny_lora", tmp_path, profile=ProfileConfig(keep_program=True))
    config = replace(config, model=replace(config.model, layers=1))
    devices = jax.devices()[1:2]
    program = Program(config, make_mesh(config.mesh, devices))
    with jax.set_mesh(program.mesh):
        compiled = compile_step(program, program.train_step, program.batch, donate_argnums=0)
        kept_program.keep_program(program, compiled)
        batch = loop.place_batch(program, make_batch(program))
        losses = []
        for step in (compiled, kept_program.load_program(tmp_path, devices)):
            state, metrics = step(program.initial_state(program.random_base()), batch)
            losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1] and np.isfinite(losses[0]) and int(state.step) == 1
    folder = tmp_path / "program"
    assert {path.name for path in folder.iterdir()} == {"train_step.hlo.txt", "train_step.executable", "README.txt"}
    assert (folder / "train_step.hlo.txt").read_text().startswith("HloModule jit_train_step")
    assert f"jax {jax.__version__}" in (folder / "README.txt").read_text()
