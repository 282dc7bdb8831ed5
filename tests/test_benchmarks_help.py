"""Each benchmark says what it is when asked for help, at once and before it does any work."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = [
    "convert",
    "cpu",
    "data",
    "decode_bound",
    "generation",
    "gpu",
    "int8",
    "kernels",
    "kills_data",
    "kills_training",
    "layouts",
    "loop",
    "plan",
    "published_steps",
    "serving",
    "tiles",
    "tokenizing",
]
LIBRARIES = ["attention", "gpu_report", "machine_code", "peer", "training"]
MODULES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))


def ask(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m benchmarks.MODULE`, which imports JAX, where it does, for the CPU."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)


def test_every_benchmark_is_asked():
    assert sorted([*COMMANDS, *LIBRARIES, "__init__", "options"]) == MODULES


@pytest.mark.parametrize("module", [*COMMANDS, *LIBRARIES])
def test_help(module):
    start = time.perf_counter()
    run = ask(module, "--help")
    seconds = time.perf_counter() - start
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    assert f"usage: python -m benchmarks.{module}" in run.stdout
    assert len(run.stdout.splitlines()) > 5, "the help says what the benchmark does"
    assert seconds < 20, "about a second, on a machine that has nothing else to do"


@pytest.mark.parametrize("module", COMMANDS)
def test_help_needs_no_jax(module):
    """It is why help comes at once: importing JAX takes longer than all the rest."""
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['benchmarks.{module}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('benchmarks.{module}', run_name='__main__')\n"
        "finally:\n"
        "    print('jax' in sys.modules, file=sys.stderr)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert run.returncode == 0 and run.stderr.splitlines()[-1] == "False", run.stderr


@pytest.mark.parametrize("module", [name for name in COMMANDS if name != "gpu"])
def test_unknown_options_are_refused(module):
    run = ask(module, "--no-such-option")
    assert run.returncode == 2 and "unrecognized arguments: --no-such-option" in run.stderr
