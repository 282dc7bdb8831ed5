"""The shape of the project: imports go one way, modules say what they are, sums are repeatable."""

import ast
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma2_jax import recipes
from gemma2_jax.config import MeshConfig
from gemma2_jax.mesh import make_mesh
from gemma2_jax.training.step import Program

ROOT = Path(__file__).parents[1]
# Rooms, from the spine to the commands. A file may import its own room and those on earlier lines, never a later one.
FLOORS = (
    ("model_config",),
    ("config", "command_line"),
    ("recipes", "config_text"),
    ("dims",),
    ("mesh",),
    ("kernels",),
    ("model",),
    ("data", "cluster"),
    ("convert",),
    ("inference",),
    ("training",),
    ("planning",),
    ("reporting",),
    ("api",),
    ("megatron_bridge",),
    ("train", "generate", "chat", "serve", "evaluate", "plan", "profile", "report", "check", "data.__main__"),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Commands that live in a room, and may import what commands may.
COMMANDS_WITHIN = {("data", "__main__")}
# Within these rooms too, a file may import only those on earlier lines.
ORDER_WITHIN = {
    "model": (("loss", "attention"), ("gemma2",), ("lora",), ("adapter_bank", "int8")),
    "convert": (
        ("files",), ("formats",), ("sources", "recognition"), ("checkpoints",), ("opening",),
        ("describe", "merging", "known_changes", "steps"), ("job",),
        ("writing_megatron",), ("writing",), ("verify",), ("__main__",),
    ),
    "training": (
        ("lock", "optim", "layer", "environment", "progress", "speed", "guard", "best", "stopping", "watchdog",
         "profile_tables"),
        ("pipeline",),
        ("checkpoint", "step", "trackers", "uploads"), ("metrics", "tokenizer", "samples", "smaller_steps"),
        ("profiling",),
        ("startup", "resume", "export", "fit", "kept_program"), ("loop",),
    ),
    "inference": (
        ("settings",), ("sampling", "text", "clock", "defaults", "decoder"), ("steps", "adapters", "weights"),
        ("engine",), ("completion", "scoring"), ("loaded",),
        ("harness", "source", "prompts", "conversation", "metrics"), ("batch", "service"), ("http",),
    ),
    "reporting": (("curves",), ("runs",), ("figures",), ("page", "plan_figures"), ("plan_page",)),
    "planning": (
        ("gpus", "hlo", "kept_outputs"), ("described_cluster", "traffic", "memory_traffic"), ("memory",), ("schedule",),
        ("dense_step", "speed"),
        ("compiled_step", "compiled_decoding", "layouts"), ("report", "known_layouts"), ("search",), ("search_table",),
        ("advice", "checked_attention", "checked_steps"), ("checkup",),
    ),
}  # fmt: skip
# Commands that take the arguments of another: a recipe and its fields.
COMMANDS_SHARED = {("plan", "train"), ("check", "train")}
FILES = sorted(
    [*(ROOT / "gemma2_jax").rglob("*.py"), *(ROOT / "convert").rglob("*.py"), *(ROOT / "configs").glob("*.py")]
)


def names_of(path: Path) -> tuple[str, ...]:
    """The parts of a file's module name below gemma2_jax: ("training", "loop")."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "gemma2_jax" else parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path: Path) -> set[tuple[str, ...]]:
    """Modules of gemma2_jax that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gemma2_jax":
            package = tuple(str(node.module).split(".")[1:])
            found |= {(*package, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")[1:]) for alias in node.names if alias.name.startswith("gemma2_jax.")}
    return found


def points_back(here: tuple[str, ...], there: tuple[str, ...]) -> bool:
    """Whether a module may not import that one, as it comes later."""
    if here in COMMANDS_WITHIN:
        return FLOOR[there[0]] >= FLOOR[".".join(here)]
    if here[0] != there[0]:
        return FLOOR[there[0]] >= FLOOR[here[0]] and (here[0], there[0]) not in COMMANDS_SHARED
    if here[0] not in ORDER_WITHIN or len(here) < 2 or len(there) < 2 or here[1] == there[1]:
        return False
    rank = {name: rank for rank, names in enumerate(ORDER_WITHIN[here[0]]) for name in names}
    return rank[there[1]] >= rank[here[1]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    here = names_of(path)
    if not here:
        assert {there[0] for there in imported(path)} <= {
            "api",
            "config",
            "model_config",
            "recipes",
            "model",
            "planning",
            "training",
        }
    elif here[0] == "configs":
        assert {there[0] for there in imported(path)} <= {"config", "model_config", "recipes"}
    else:
        back = sorted(".".join(there) for there in imported(path) if points_back(here, there))
        assert not back, f"{'.'.join(here)} imports {back}, which come after it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_say_what_they_are(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} opens without a paragraph"


@pytest.mark.usefixtures("optimized")  # else XLA does not use that library
@pytest.mark.exhaustive
def test_sums_are_repeatable():
    """Norms of DoRA, a fused sum, come out finite and alike each time (see cluster/platforms.py)."""
    recipe = recipes.load_recipe("tiny_dora")
    config = replace(recipe, init="", model=replace(recipe.model, layers=2))
    program = Program(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    starts = [program.initial_state(program.random_base()).params for _ in range(5)]
    for params in starts:
        for path, value in params.items():
            np.testing.assert_array_equal(value, starts[0][path], err_msg=path)
