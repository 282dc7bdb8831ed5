"""What a process has set for JAX: nothing by importing the package, everything by `prepare_process`."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_runs import ROOT

from gemma2_jax.cluster import platforms

# What these commands and JAX read. Each test says what its process has of them.
VARIABLES = (
    "XLA_FLAGS", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_ENABLE_COMPILATION_CACHE",
    "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME",
)  # fmt: skip

IMPORTS_ALONE = """
import importlib, logging, os, pkgutil, sys
# Other people's packages set what they like.
import absl.logging, einops, flax.nnx, grain, jax, jax.experimental.pallas, lm_eval.api.model, optax, orbax.checkpoint
import rich.progress, safetensors, transformers, tyro, yaml
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu, triton

def describe_loggers():
    named = {"": logging.getLogger(), **logging.root.manager.loggerDict}
    return {
        name: (logger.level, logger.disabled, logger.propagate, logger.filters[:], logger.handlers[:])
        for name, logger in named.items() if isinstance(logger, logging.Logger) and not name.startswith("gemma2_jax")
    }

before, loggers = dict(os.environ), describe_loggers()
import gemma2_jax
assert dict(os.environ) == before, "the package"
names = [m.name for m in pkgutil.walk_packages(gemma2_jax.__path__, "gemma2_jax.") if not m.name.endswith("__main__")]
for name in [*names, "gemma2_jax.convert.__main__"]:
    importlib.import_module(name)
    assert dict(os.environ) == before, name
    now = describe_loggers()
    assert {known: now[known] for known in loggers} == loggers, name
    assert all(logger[0] == 0 for known, logger in now.items() if known not in loggers), name
assert len(names) > 40, names
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
PREPARED = """
import os, sys
from gemma2_jax.cluster import platforms
platforms.prepare_process()
import jax
print(jax.default_backend())
print(os.environ.get("XLA_FLAGS"))
print(os.environ.get("XLA_CLIENT_MEM_FRACTION"))
print(jax.config.jax_compilation_cache_dir)
print(platforms.describe_cache())
"""
LATE = """
import warnings
import jax
jax.devices()
from gemma2_jax.cluster import platforms
platforms.prepare_process()
"""
# Three runs of one program, as far as JAX's caches know.
DAMAGED = """
import pathlib, sys
from gemma2_jax.cluster import platforms
platforms.prepare_process()
import jax
from jax.experimental.compilation_cache import compilation_cache
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
for run in range(3):
    print(run, jax.jit(lambda x: x + 1)(1), sum(hits), file=sys.stderr)
    [entry] = pathlib.Path(jax.config.jax_compilation_cache_dir).glob("jit__lambda-*-cache")
    if run == 0:
        entry.write_bytes(entry.read_bytes()[:-9])
    jax.clear_caches()
    compilation_cache.reset_cache()
"""

HUB = """
from gemma2_jax.cluster import platforms
platforms.prepare_process()
from gemma2_jax.convert import opening
from gemma2_jax.data import encoding
from gemma2_jax.training import loop
import huggingface_hub
print(huggingface_hub.get_token(), huggingface_hub.constants.HF_HOME, huggingface_hub.constants.HF_HUB_CACHE)
"""


def run(code: str, **variables: str) -> tuple[list[str], str]:
    """Lines that a new process prints, and what it writes to standard error."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(
    ("main", "variables", "setting", "given"),
    [
        ("gemma2_jax.train", {}, "always [madvise] never", "glibc.malloc.hugetlb=1"),
        ("gemma2_jax.__main__", {"GLIBC_TUNABLES": "a=1"}, "always [madvise] never", "a=1:glibc.malloc.hugetlb=1"),
        ("gemma2_jax.train", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "always [madvise] never", None),
        ("gemma2_jax.train", {}, "[always] madvise never", None),
        ("gemma2_jax.train", {}, None, None),
        ("gemma2_jax.train", {"JAX_PLATFORMS": "cuda"}, "always [madvise] never", None),
        ("pytest", {}, "always [madvise] never", None),
    ],
)
def test_a_command_on_a_cpu_asks_for_huge_pages(main, variables, setting, given, tmp_path, monkeypatch):
    """By starting anew with the arguments that it was given, once; as nobody's library, and not against the user."""
    started = []
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=SimpleNamespace(name=main)))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", main, "--steps", "3"])
    monkeypatch.setattr(os, "execv", lambda *arguments: started.append((*arguments, os.environ["GLIBC_TUNABLES"])))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(platforms, "_PAGES_SETTING", tmp_path / "enabled")
    if setting:
        (tmp_path / "enabled").write_text(setting)
    for _ in range(2):
        platforms.restart_with_huge_pages()
    command = [sys.executable, "-X", "dev", "-m", main, "--steps", "3"]
    assert started == ([(sys.executable, command, given)] if given else [])


def test_imports_change_nothing():
    run(IMPORTS_ALONE)


def test_what_a_command_sets(tmp_path: Path):
    (platform, flags, share, folder, described), error = run(PREPARED, XDG_CACHE_HOME=str(tmp_path))
    assert platform == "cpu"
    said = {"", "this machine has no CUDA driver (libcuda.so.1): computing on CPU\n"}
    assert error in said, "a CUDA plugin, if there is one, is not heard"
    assert flags == "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
    assert share == "0.95"
    assert folder == str(tmp_path / "gemma2_jax" / "xla")
    assert described == f"kept in {folder} (JAX_ENABLE_COMPILATION_CACHE=0 turns it off)"


def test_collectives_of_gpus_end_at_some_time(monkeypatch):
    flag = "xla_gpu_nccl_termination_timeout_seconds"
    for given, described in (("", f"{flag}=7200"), (f"--{flag}=60", f"{flag}=60")):
        monkeypatch.setenv("XLA_FLAGS", given)
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
        platforms._set_flags(on_cpu=False)
        assert platforms.describe_collective_timeout() == described
        assert os.environ["XLA_FLAGS"].count(flag) == 1


def test_what_the_user_has_set_stays(tmp_path: Path):
    flags = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"
    given = {
        "XLA_FLAGS": flags,
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine"),
    }
    printed, _ = run(PREPARED, **given)
    assert printed[1:4] == [flags, "None", str(tmp_path / "mine")], "JAX refuses both variables of memory at once"
    flag = "--xla_gpu_nccl_termination_timeout_seconds=7"  # XLA ends a process that gives it a flag it does not know
    printed, _ = run(PREPARED, XLA_FLAGS=flag, JAX_ENABLE_COMPILATION_CACHE="0")
    assert printed[1].startswith(f"{flag} --xla_cpu_experimental_ynn_fusion_type=")
    assert printed[3:] == ["None", "not kept: JAX_ENABLE_COMPILATION_CACHE is off"]
    printed, _ = run(PREPARED, JAX_COMPILATION_CACHE_DIR="/proc/nope")
    assert printed[4].startswith("not kept: /proc/nope cannot be written to (")


@pytest.mark.parametrize("asked", ["nope", "cuda"])
def test_a_platform_that_is_not_there(asked):
    done = subprocess.run(
        [sys.executable, "-m", "gemma2_jax.generate", "--checkpoint", "assets/tiny-gemma2", "--prompt", "a"],
        env=os.environ | {"JAX_PLATFORMS": asked}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    said = f"error: JAX_PLATFORMS is {asked!r}, and JAX finds no such device; every machine has cpu. Set JAX_PLATFORMS"
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(said), done.stderr


def test_a_program_that_was_kept_in_part(tmp_path: Path):
    """It is said once, and the run after that reads what was compiled instead."""
    _, error = run(DAMAGED, JAX_COMPILATION_CACHE_DIR=str(tmp_path), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    said = [line for line in error.splitlines() if re.match(r"\d \d|jit|.*[Ww]arning:", line)]
    damage = "jit__lambda in the cache of compiled programs was cut off or damaged; it is removed and compiled again"
    assert said == ["0 2 0", damage, "1 2 0", "2 2 1"], error


@pytest.mark.parametrize("told", [False, True])
def test_too_late(told: bool, tmp_path: Path):
    """JAX had started: a warning where that matters."""
    flags = {"XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"} if told else {}
    _, error = run(LATE, XDG_CACHE_HOME=str(tmp_path), **flags)
    warned = [line for line in error.splitlines() if "UserWarning" in line]
    assert len(warned) == (0 if told else 1), error
    if not told:
        assert "JAX had started before gemma2_jax could prepare it, so that sums on CPU may differ" in warned[0]
        assert "prepare_process() before the first use of JAX" in warned[0]


def test_the_hub_has_the_users_token_and_folder(tmp_path: Path):
    (line,), _ = run(HUB, HF_TOKEN="hf_secret", HF_HOME=str(tmp_path), XDG_CACHE_HOME="/nowhere")
    assert line == f"hf_secret {tmp_path} {tmp_path}/hub"
