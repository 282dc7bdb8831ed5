"""Describes checkpoints for people: in a sentence, and as tables."""

import dataclasses
import math
from collections import Counter

from rich import box
from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from gemma2_jax.command_line import escape
from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.convert.formats import table
from gemma2_jax.model_config import AdapterConfig

_NAMES = {
    "huggingface": "a Hugging Face model",
    "peft": "a PEFT adapter",
    "orbax": "an Orbax folder",
    "run": "a run",
    "megatron": "a Megatron checkpoint",
    "deepmind": "a checkpoint of google-deepmind/gemma",
    "gguf": "a GGUF file",
}


def describe_checkpoint(checkpoint: Checkpoint) -> str:
    """A sentence about the format, the adapter and the model of a checkpoint."""
    parts = [describe_adapter(checkpoint.adapter)] if checkpoint.adapter.kind != "none" else []
    if checkpoint.model:
        parts.append(f"Gemma 2 of {checkpoint.model.layers} layers, {checkpoint.model.parameter_count():,} parameters")
    layout = f" ({checkpoint.layout})" if checkpoint.layout else ""
    return f"{_NAMES[checkpoint.format]}{layout}: " + "; ".join(parts)


def describe_adapter(adapter: AdapterConfig) -> str:
    """The kind, the ranks, the scales and the projections of an adapter, and the weights that it replaces."""
    kind = ("rank-stabilized " if adapter.rslora else "") + {"lora": "LoRA", "dora": "DoRA"}[adapter.kind]
    ranks, alphas = (
        f" ({table.list_names([f'{name} {number:g}' for name, number in pattern])})" if pattern else ""
        for pattern in (adapter.rank_pattern, adapter.alpha_pattern)
    )
    places = ", ".join(table.match_targets(adapter)) or "no projection"
    if adapter.unmergeable_targets:
        places += f" ({' and '.join(adapter.unmergeable_targets)} after the post-norm)"
    if adapter.layers:
        places += f" in layers {', '.join(map(str, adapter.layers))}"
    if adapter.modules_to_save:
        places += f"; {', '.join(adapter.modules_to_save)} in place of the model's"
    if adapter.trainable_tokens:
        tokens = table.list_names([*map(str, adapter.trainable_tokens)])
        places += f"; {len(adapter.trainable_tokens)} rows of the embedding, of tokens {tokens}"
    return f"{kind} of rank {adapter.rank}{ranks}, alpha {adapter.alpha:g}{alphas} on {places}"


def print_table(rendered: RenderableType) -> None:
    """Prints a table, cut to the width of a terminal. In a pipe or file no cell is cut, and no line ends in blanks."""
    console = Console()
    if console.is_terminal:
        console.print(rendered)
        return
    unbounded = Console(width=1 << 16)
    with unbounded.capture() as captured:
        unbounded.print(rendered)
    for line in captured.get().splitlines():
        print(line.rstrip())


def print_checkpoint(checkpoint: Checkpoint) -> None:
    """Prints all that is known of a checkpoint without reading its weights."""
    shapes = checkpoint.shapes
    sizes = {path: math.prod(x.shape) * x.dtype.itemsize for path, x in shapes.items()}
    dtypes = Counter[str]()
    for path, x in shapes.items():
        dtypes[x.dtype.name] += sizes[path]
    model = dataclasses.asdict(checkpoint.model) if checkpoint.model else {}
    lines = {
        "format": _NAMES[checkpoint.format] + (f", {checkpoint.layout}" if checkpoint.layout else ""),
        "path": str(checkpoint.path),
        **({"model": f"Gemma 2, {checkpoint.model.parameter_count():,} parameters"} if checkpoint.model else {}),
        **({"": ", ".join(f"{key} {value}" for key, value in model.items())} if model else {}),
        **({"adapter": describe_adapter(checkpoint.adapter)} if checkpoint.adapter.kind != "none" else {}),
        **({"base": checkpoint.base} if checkpoint.base else {}),
        "weights": ", ".join(f"{decimal(size)} of {name}" for name, size in dtypes.items())
        or "not read: no base model",
        "tokenizer": str(checkpoint.tokenizer or "none"),
    }
    facts = Table.grid(padding=(0, 2))
    notes = [("note", note) for note in checkpoint.notes]
    for key, value in (*lines.items(), *notes):
        facts.add_row(key, Text(escape(value)))  # a name may look like markup
    print_table(facts)
    if not shapes:
        return
    # Without lines between columns, the longest names and shapes of 27B fit into 80.
    arrays = Table(
        "array", "dims", "shape", "dtype", "size", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    rows = *table.MODEL, *table.table_rows(checkpoint.adapter, model.get("layers", 1))
    letters = {row.path: row.dims for row in rows}
    for path, x in shapes.items():
        arrays.add_row(path, letters[path], " x ".join(map(str, x.shape)), x.dtype.name, decimal(sizes[path]))
    print_table(arrays)
