"""The compiled step of a run, kept in WORKDIR/program: its HLO, to read, and the executable itself, to run again.

An executable belongs to the versions and the kind of devices that made it; README.txt beside it says which.
"""

import pickle
from pathlib import Path

import jax
from jax.experimental import serialize_executable

from gemma2_jax.training import environment
from gemma2_jax.training.step import Program

FOLDER = "program"
HLO_FILE, EXECUTABLE_FILE, README_FILE = "train_step.hlo.txt", "train_step.executable", "README.txt"


def keep_program(program: Program, compiled: jax.stages.Compiled) -> None:
    """Writes the compiled step of a run into its working directory. Every process calls it, and process 0 writes."""
    if jax.process_index() != 0:
        return
    folder = program.config.output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        HLO_FILE: (compiled.as_text() or "").encode(),
        EXECUTABLE_FILE: pickle.dumps(serialize_executable.serialize(compiled)),
        README_FILE: _describe(program).encode(),
    }
    for name, content in files.items():
        partial = folder / f"{name}.partial"
        partial.write_bytes(content)
        partial.replace(folder / name)


def load_program(workdir: Path, devices: list | None = None) -> jax.stages.Compiled:
    """The step that a run has kept, a function of a state and a batch as `Program.train_step` is.

    It runs on as many devices of the same kind, `devices` or all of this process's. The file is a pickle, which can run
    anything: load none from strangers.
    """
    executable, arguments, results = pickle.loads((workdir / FOLDER / EXECUTABLE_FILE).read_bytes())
    return serialize_executable.deserialize_and_load(executable, arguments, results, execution_devices=devices)


def _describe(program: Program) -> str:
    """What made the program, and how it is loaded."""
    entry = environment.describe_environment(step=0)
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    devices = ", ".join(f"{count} x {kind}" for kind, count in entry["devices"].items())
    options = " ".join(f"{name}={value}" for name, value in program.compiler_options.items()) or "XLA's own"
    return (
        f"The training step of {program.config.workdir}, compiled for {devices}, {entry['processes']} process(es), by\n"
        f"{versions}\n{entry['backend']}, driver {entry['driver']}, options {options}\n\n"
        f"{HLO_FILE} is its text. {EXECUTABLE_FILE} runs where all of this is the same:\n"
        "step = gemma2_jax.training.kept_program.load_program(WORKDIR); state, metrics = step(state, batch)\n"
    )
