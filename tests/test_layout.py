"""The shape of the project: imports go one way, modules say what they are, sums are repeatable."""

import ast
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma2_jax import config as configs
from gemma2_jax.config import MeshConfig
from gemma2_jax.mesh import make_mesh
from gemma2_jax.step import Program

ROOT = Path(__file__).parents[1]
# Each module may import those before it, never those after.
ORDER = (
    ("config", "coordinator", "platforms"), ("hosts",), ("dims",), ("mesh", "kernels"),
    ("attention_xla", "loss"), ("attention_mosaic",), ("attention",), ("model",),
    ("lora", "pipeline"), ("optim", "data"),
    ("checkpoint", "step", "decode"), ("convert",), ("metrics", "profiling"), ("report", "resume", "export"),
    ("loop", "traffic"), ("train", "generate"), ("plan",),
)  # fmt: skip
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
FILES = sorted(
    [*(ROOT / "gemma2_jax").rglob("*.py"), *(ROOT / "convert").glob("*.py"), *(ROOT / "configs").glob("*.py")]
)


def unit(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "gemma2_jax" else parts[0]


def imported(path: Path) -> set[str]:
    """Units of gemma2_jax that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "gemma2_jax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gemma2_jax."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gemma2_jax.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    here = unit(path)
    if here == "__init__":
        assert imported(path) == set()
    elif here == "configs":
        assert imported(path) <= {"config"}
    else:
        back = {name for name in imported(path) if name != here and RANK[name] >= RANK[here]}
        assert not back, f"{here} imports {back}, which come after it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_say_what_they_are(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} opens without a paragraph"


@pytest.mark.usefixtures("optimized")  # else XLA does not use that library
def test_sums_are_repeatable():
    """Norms of DoRA, a fused sum, come out finite and alike each time (see gemma2_jax/__init__.py)."""
    recipe = configs.load("tiny_dora")
    config = replace(recipe, init="", model=replace(recipe.model, layers=2))
    program = Program(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    starts = [program.fresh(program.random_base()).params for _ in range(5)]
    for params in starts:
        for path, value in params.items():
            np.testing.assert_array_equal(value, starts[0][path], err_msg=path)
