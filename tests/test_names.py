"""What things are called: identifiers that a newcomer can search for, and one spelling."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for folder in ("gemma2_jax", "convert", "configs", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if path.relative_to(ROOT / folder).parts[0] not in ("configs", "convert") or folder in ("configs", "convert")
)
# Words of every sentence: no function, class, argument or field is found by them.
VAGUE = {"settle", "joined", "held", "over", "some", "anew", "wide", "tall", "apart", "until", "way"}
BRITISH = re.compile(
    r"tokenis|normalis|initialis|optimis|serialis|parallelis[ei]|summaris|organis|quantis|recognis|behaviour|colour"
    r"|licence|centred|honour|neighbour|cancelled|labelled",
    re.IGNORECASE,
)


def defined_names(tree: ast.AST) -> Iterator[str]:
    """Names of functions, classes and fields, and of the arguments of functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            yield from (one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_can_be_searched_for(path):
    vague = {name for name in defined_names(ast.parse(path.read_text())) if name.strip("_") in VAGUE}
    vague |= {name for name in defined_names(ast.parse(path.read_text())) if re.search(r"_(at|nothing)$", name)}
    assert not vague, f"{path.relative_to(ROOT)} calls things {vague}, which are words of every comment"


WRITTEN = [
    *(path for folder in ("gemma2_jax", "convert", "configs", "benchmarks", "docs", "examples", ".github")
      for path in (ROOT / folder).rglob("*")),
    *(path for path in (ROOT / "tests").rglob("*.py") if path.name != "test_names.py"),
    *ROOT.glob("*.*"),
]  # fmt: skip


def test_words_are_spelled_the_american_way():
    """As the ecosystem spells them: who searches for "tokenize" finds everything."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in WRITTEN
        if path.suffix in (".py", ".md", ".toml", ".yml", ".yaml", ".ipynb")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BRITISH.search(line)
    ]
    assert not found, "\n".join(found)
