"""What things are called: identifiers that a newcomer can search for, and one spelling."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for folder in ("gemma2_jax", "convert", "configs", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if path.relative_to(ROOT / folder).parts[0] not in ("configs", "convert") or folder in ("configs", "convert")
)
# Words of every sentence: nothing is found by them.
VAGUE = {"settle", "joined", "held", "over", "some", "anew", "wide", "tall", "apart", "until", "way", "theirs"}
BRITISH = re.compile(
    r"tokenis|normalis|initialis|optimis|serialis|parallelis[ei]|summaris|organis|quantis|recognis|behaviour|colour"
    r"|licence|centred|honour|neighbour|cancelled|labelled",
    re.IGNORECASE,
)


def defined_names(tree: ast.AST) -> Iterator[str]:
    """Names of functions, classes, arguments and variables; those of tests are sentences."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[:5] != "test_":
            yield node.name
        if isinstance(node, ast.arg):
            yield node.arg
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_can_be_searched_for(path):
    names = set(defined_names(ast.parse(path.read_text())))
    vague = {name for name in names if name.strip("_") in VAGUE or re.search(r"_(at|nothing)$", name)}
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
