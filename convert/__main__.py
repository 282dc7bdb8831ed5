"""python -m gemma2_jax.convert SRC DST --to orbax|hf|peft: reads any checkpoint, writes one of three formats.

The command line only: it parses before it imports what is slow, says what it found, and says what it wrote. JAX runs
on the CPU here whatever the machine has: there is nothing to compute but casts and merges.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gemma2_jax import platforms
from gemma2_jax.config import DType

if TYPE_CHECKING:
    from gemma2_jax.convert.checkpoints import Checkpoint
    from gemma2_jax.convert.writing import Job

_NAMES = {"huggingface": "a Hugging Face model", "peft": "a PEFT adapter", "orbax": "an Orbax folder", "run": "a run"}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Convert a checkpoint of Gemma 2 from any of the formats Hugging Face, PEFT, Orbax and run to one of three."""

    src: tyro.conf.Positional[str]  # what to read: a folder whose format is found out, or a Hub id
    dst: tyro.conf.Positional[Path]  # folder to write; it must not exist yet
    to: Literal["orbax", "hf", "peft"]  # format to write; peft is the adapter alone
    adapter: str | None = None  # adapter to put on SRC: a PEFT or Orbax folder, or a run
    merge: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # add the adapter into the weights, in float32
    dtype: DType | None = None  # of what is written; None: as stored


def main() -> None:
    """Parses, converts; exits with a sentence where that cannot be done."""
    arguments = tyro.cli(Arguments, prog="python -m gemma2_jax.convert")
    platforms.on_cpu()
    try:
        _convert(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _convert(arguments: Arguments) -> None:
    from rich import progress

    from gemma2_jax.convert.checkpoints import open_checkpoint
    from gemma2_jax.convert.writing import Job, write

    if arguments.adapter is None:
        source = open_checkpoint(arguments.src)
    else:
        source = open_checkpoint(arguments.adapter, base=arguments.src)
    print(f"read {arguments.adapter or arguments.src} as {_describe(source)}")
    job = Job(source=source, to=arguments.to, merge=arguments.merge, dtype=arguments.dtype)
    columns = (
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns) as bar:
        task = bar.add_task("", total=job.size)
        write(job, arguments.dst, moved=lambda size: bar.advance(task, size))
    print(f"wrote {arguments.dst}: {_summary(job)}\n{_usage(job, arguments.dst)}")


def _describe(source: "Checkpoint") -> str:
    from gemma2_jax.convert import table

    parts = []
    if source.adapter.kind != "none":
        kind = ("rank-stabilised " if source.adapter.rslora else "") + {"lora": "LoRA", "dora": "DoRA"}[
            source.adapter.kind
        ]
        where = ", ".join(table.targets(source.adapter))
        parts.append(f"{kind} of rank {source.adapter.rank}, alpha {source.adapter.alpha:g} on {where}")
    if source.model:
        parts.append(f"Gemma 2 of {source.model.layers} layers, {source.model.parameter_count():,} parameters")
    return f"{_NAMES[source.format]}: " + "; ".join(parts)


def _summary(job: "Job") -> str:
    from rich.filesize import decimal

    dtypes = sorted({shape.dtype.name for shape in job.shapes.values()})
    what = ("merged " if job.merge else "") + " and ".join(job.groups)
    return f"{what}, {decimal(job.size)} of {' and '.join(dtypes)}"


def _usage(job: "Job", target: Path) -> str:
    if job.to == "hf":
        return f"load it: transformers.AutoModelForCausalLM.from_pretrained({str(target)!r})"
    if job.to == "peft":
        base = job.source.base or "its base model"
        return f"load it: peft.PeftModel.from_pretrained(model, {str(target)!r}), where model is {base}"
    if "adapter" in job.groups:
        return f"load it: gemma2_jax.convert.checkpoints.open_checkpoint({str(target)!r})"
    return f"train from it: python -m gemma2_jax.train --config NAME --init {target}"


if __name__ == "__main__":
    main()
