"""What a checkpoint is, for people: in a sentence, and as tables."""

import dataclasses
import math
from collections import Counter

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.table import Table

from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.convert.formats import table

_NAMES = {
    "huggingface": "a Hugging Face model",
    "peft": "a PEFT adapter",
    "orbax": "an Orbax folder",
    "run": "a run",
    "megatron": "a Megatron checkpoint",
}


def describe_checkpoint(found: Checkpoint) -> str:
    """Its format, its adapter and its model."""
    parts = [describe_adapter(found)] if found.adapter.kind != "none" else []
    if found.model:
        parts.append(f"Gemma 2 of {found.model.layers} layers, {found.model.parameter_count():,} parameters")
    layout = f" ({found.layout})" if found.layout else ""
    return f"{_NAMES[found.format]}{layout}: " + "; ".join(parts)


def describe_adapter(found: Checkpoint) -> str:
    """Its adapter's kind, size and place."""
    config = found.adapter
    kind = ("rank-stabilised " if config.rslora else "") + {"lora": "LoRA", "dora": "DoRA"}[config.kind]
    where = ", ".join(table.match_targets(config))
    if config.unmergeable_targets:
        where += f" ({' and '.join(config.unmergeable_targets)} after the post-norm)"
    return f"{kind} of rank {config.rank}, alpha {config.alpha:g} on {where}"


def print_table(table: RenderableType) -> None:
    """Prints a table, as wide as the terminal; into a pipe or a file as wide as it is, without trailing blanks."""
    console = Console()
    if console.is_terminal:
        console.print(table)
        return
    unbounded = Console(width=1 << 16)
    with unbounded.capture() as captured:
        unbounded.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())


def print_checkpoint(found: Checkpoint) -> None:
    """Prints all there is to know without reading the weights."""
    shapes = found.shapes
    bytes_of = {path: math.prod(x.shape) * x.dtype.itemsize for path, x in shapes.items()}
    dtypes = Counter[str]()
    for path, x in shapes.items():
        dtypes[x.dtype.name] += bytes_of[path]
    model = dataclasses.asdict(found.model) if found.model else {}
    lines = {
        "format": _NAMES[found.format] + (f", {found.layout}" if found.layout else ""),
        "path": str(found.path),
        **({"model": f"Gemma 2, {found.model.parameter_count():,} parameters"} if found.model else {}),
        **({"": ", ".join(f"{key} {value}" for key, value in model.items())} if model else {}),
        **({"adapter": describe_adapter(found)} if found.adapter.kind != "none" else {}),
        **({"base": found.base} if found.base else {}),
        "weights": ", ".join(f"{decimal(size)} of {name}" for name, size in dtypes.items())
        or "not read: no base model",
        "tokenizer": str(found.tokenizer or "none"),
    }
    block = Table.grid(padding=(0, 2))
    for key, value in lines.items():
        block.add_row(key, value)
    for note in found.notes:
        block.add_row("note", note)
    print_table(block)
    if not shapes:
        return
    tensors = Table("array", "dims", "shape", "dtype", "size")
    letters = {row.path: row.dims for row in (*table.MODEL, *table.table_rows(found.adapter))}
    for path, x in shapes.items():
        tensors.add_row(path, letters[path], " x ".join(map(str, x.shape)), x.dtype.name, decimal(bytes_of[path]))
    print_table(tensors)
