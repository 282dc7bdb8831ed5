"""python -m gemma2_jax.convert: any checkpoint of Gemma 2 into any other format, what one is, whether two are the same.

    SRC DST --to FORMAT    convert
    inspect PATH           say what a checkpoint is
    verify A B             compare two, tensor by tensor
    verify RUN             check every step of a run, or one, by its checksums
    import, export         convert under Megatron-Bridge's names

This is the command line only: it parses its arguments before it imports slow libraries, and prints what it read and
what it wrote. JAX runs on the CPU here whatever the machine has, as there is nothing to compute but casts and merges.
"""

import math
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gemma2_jax import command_line
from gemma2_jax.cluster import platforms
from gemma2_jax.model_config import DType, FileDType

if TYPE_CHECKING:
    from rich.table import Table

    from gemma2_jax.convert.checkpoints import Checkpoint
    from gemma2_jax.convert.job import Job
    from gemma2_jax.convert.steps import StepCheck
    from gemma2_jax.convert.verify import Difference

_Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a checkpoint of Gemma 2 into any other format.

    SRC is of Hugging Face, PEFT, Orbax, Megatron or GGUF, or a run, by its files.

    Other commands: inspect PATH says what a checkpoint is, verify A B compares two.

    Import and export have Megatron-Bridge's names. Each command has a --help.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC", help="folder, .gguf file or Hub id to read")]
    # Folder to write, or .gguf file; it must not exist yet.
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    # Format to write. peft, megatron-adapter and gguf-adapter are the adapter alone; megatron is torch_dist, which
    # Megatron-Bridge loads; megatron-legacy is a file a rank; gguf is for llama.cpp and Ollama.
    to: Literal["orbax", "hf", "peft", "megatron", "megatron-legacy", "megatron-adapter", "gguf", "gguf-adapter"]
    adapter: str | None = None  # adapter to put on SRC: a folder of PEFT, Orbax or Megatron, or a run
    merge: _Flag = False  # add the adapter into the weights, in float32
    # Program that is to load the adapter: it is refused if that program could not, with what to do instead.
    reader: Annotated[Literal["vllm"] | None, tyro.conf.arg(name="for")] = None
    dtype: FileDType | None = None  # dtype to write, float16 and q8_0 in gguf alone; None: as stored
    # Folder or Hub id with the config.json of a checkpoint that has none (Megatron, google-deepmind/gemma), or of the
    # model of an adapter, or with the tokenizer of a GGUF file.
    hf_config: str | None = None
    drop: tuple[str, ...] = ()  # patterns of names of SRC's tensors to leave out: 'v_head.*'
    # Tensor-parallel ranks that megatron-legacy has files for, or that load a megatron-adapter whose gate and up have
    # an A each; what else is written is loaded at any.
    tp: int = 1
    pp: int = 1  # pipeline stages that megatron-legacy has files for

    def __post_init__(self) -> None:
        command_line.check_paths(self, "src", "dst", "adapter", "hf_config")


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Print what a checkpoint is: its format, config, arrays, layout and adapter."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]  # a folder, a .gguf file, or a Hub id
    hf_config: str | None = None  # folder or Hub id with the config.json of a Megatron checkpoint that has none

    def __post_init__(self) -> None:
        command_line.check_paths(self, "path", "hf_config")


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Compare two checkpoints of any formats, and say what explains a difference.

    Of a run, or a step of one, given alone: check each step's files and arrays.

    The exit status is 1 where two differ, or a step is damaged.
    """

    first: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]  # a folder, a .gguf file, or a Hub id
    second: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="B")] = None  # another
    atol: float = 0.0  # largest difference of two elements that counts as none; 0: bits and dtypes must be the same
    prompt: str | None = None  # compare their logits on this text too
    hf_config: str | None = None  # folder or Hub id with the config.json of Megatron checkpoints that have none

    def __post_init__(self) -> None:
        command_line.check_paths(self, "first", "second", "hf_config")
        if not 0 <= self.atol < math.inf:
            raise ValueError(f"atol is {self.atol}; it must be a finite number of at least 0")


@dataclass(frozen=True, kw_only=True)
class Import:
    """Convert a Hugging Face model to Megatron, as Megatron-Bridge's import does."""

    hf_model: str  # folder or Hub id
    megatron_path: str  # folder to write
    torch_dtype: DType | None = None  # dtype to write; None: as stored
    device_map: str | None = None  # no effect: conversions need no device
    trust_remote_code: _Flag = False  # no effect: no checkpoint's code is run

    def __post_init__(self) -> None:
        command_line.check_paths(self, "hf_model", "megatron_path")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Convert a Megatron checkpoint to Hugging Face, as Megatron-Bridge's export does."""

    hf_model: str  # folder or Hub id that has the model's config.json and tokenizer
    megatron_path: str  # folder to read
    hf_path: str  # folder to write
    torch_dtype: DType | None = None  # dtype to write; None: as stored
    no_progress: _Flag = False  # show no bar
    trust_remote_code: _Flag = False  # no effect: no checkpoint's code is run

    def __post_init__(self) -> None:
        command_line.check_paths(self, "hf_model", "megatron_path", "hf_path")


def main(program: str = "python -m gemma2_jax.convert") -> None:
    """Parses the command line and runs the command; exits with a sentence if that cannot be done."""
    name, *arguments = sys.argv[1:] or [""]
    if name in _COMMANDS:
        kind, run = _COMMANDS[name]
        program = f"{program} {name}"
    else:
        kind, run = Convert, _convert
        arguments = sys.argv[1:]
        near = command_line.suggest(name, _COMMANDS, cutoff=0.75)
        if near and not Path(name).exists():
            command_line.exit_usage(f"there is no command {name}, nor a folder of that name{near}", program)
    command = command_line.parse(kind, arguments, program)
    for number in (signal.SIGTERM, signal.SIGHUP):  # an exit removes a folder that is half written
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    platforms.prepare_process(cpu=True, cache=False)
    with command_line.exit_with_sentence():
        run(command)


def _inspect(command: Inspect) -> None:
    from gemma2_jax.convert import describe
    from gemma2_jax.convert.opening import open_checkpoint

    describe.print_checkpoint(open_checkpoint(command.path, hf_config=command.hf_config))


def _verify(command: Verify) -> None:
    if command.second is None:
        _verify_steps(Path(command.first).expanduser())
        return
    from gemma2_jax.convert import describe, verify

    pair = [_open(path, None, command.hf_config) for path in (command.first, command.second)]
    size = sum(shape.size * shape.dtype.itemsize for shape in pair[0].shapes.values())
    with _progress_bar(size) as progress:
        arrays = verify.compare_checkpoints(pair[0], pair[1], progress)
    different = [array for array in arrays if not array.within(command.atol)]
    if different:
        describe.print_table(_difference_table(different))
    elements = sum(array.size for array in arrays)
    rule = f"within {command.atol:g}" if command.atol else "bit by bit"
    largest = f"; the largest difference is {max(a.largest for a in arrays):.3g}" if not different else ""
    print(
        f"{len(arrays) - len(different)} of {len(arrays)} arrays ({elements:,} elements) are the same, {rule}"
        + largest * bool(command.atol)
    )
    for dtypes in verify.list_dtypes(different, arrays):
        print(f"note: {dtypes}")
    if configs := verify.describe_config_differences(*pair):
        print(f"note: their configs differ: {configs}")
    print(verify.conclude(arrays, command.atol))
    if adapters := verify.describe_adapter_differences(*pair):
        print(f"Their adapters compute different things all the same: {adapters}.")
    if command.prompt is not None:
        _compare_logits(pair, command.prompt)
    if different or adapters:
        sys.exit(1)


def _verify_steps(path: Path) -> None:
    from gemma2_jax.convert import describe, steps

    folders = steps.list_folders(path)
    size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    with _progress_bar(size) as progress:
        checks = list(steps.check_steps(folders, progress))
    describe.print_table(_steps_table(checks))
    in_use = [check for check in checks if check.in_use]
    damaged = [check.name for check in in_use if check.problem]
    unverified = [check.name for check in in_use if not check.problem and not check.verified]
    print(f"{len(in_use) - len(damaged)} of {len(in_use)} steps are whole")
    if unverified:
        print("note: what has no checksums was only read to its end, and may hold bits that have flipped")
    if damaged:
        print("Training sets a damaged step aside if an earlier one is whole.")
        print(f"Copied again, these would be mended: {', '.join(damaged)}")
        sys.exit(1)


def _steps_table(checks: "list[StepCheck]") -> "Table":
    from rich import box
    from rich.filesize import decimal
    from rich.table import Column, Table

    table = Table(
        "step", Column("files", justify="right"), Column("size", justify="right"), Column("found", overflow="fold"),
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0),
    )  # fmt: skip
    for check in checks:
        whole = "as it was written" if check.verified else "whole, but without checksums"
        table.add_row(
            check.name, f"{check.files:,}", decimal(check.size), f"damaged: {check.problem}" if check.problem else whole
        )
    return table


def _difference_table(arrays: "list[Difference]") -> "Table":
    from rich import box
    from rich.table import Column, Table

    # Without lines between columns, and with names and shares, all fits into 80.
    numbers = (Column(name, justify="right") for name in ("unequal", "by at most", "relative L2"))
    explanations = [x.explanation or (f"plus a matrix of rank {x.rank}" if x.rank else "") for x in arrays]
    columns = "array", *numbers, *(["the second is the first"] if any(explanations) else [])
    table = Table(*columns, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for array, explanation in zip(arrays, explanations, strict=True):
        many = array.unequal * 100 >= array.size
        unequal = f"{array.unequal / array.size:.0%}" if many else f"{array.unequal:,}"
        amounts = f"{array.largest:.3g}", f"{array.relative:.3g}", *([explanation] if any(explanations) else [])
        table.add_row(array.name, unequal, *amounts)
    return table


def _compare_logits(pair: "list[Checkpoint]", prompt: str) -> None:
    import numpy as np

    from gemma2_jax.convert import verify
    from gemma2_jax.convert.formats.companions import load_tokenizer

    for checkpoint in pair:
        verify.check_weights(checkpoint)
    folder = pair[0].tokenizer or pair[1].tokenizer
    if folder is None:
        raise ValueError("neither checkpoint has a tokenizer for the prompt; copy its model's tokenizer.json there")
    tokens = load_tokenizer(folder)(prompt)["input_ids"]
    logits_TV, other_TV = (verify.compute_logits(checkpoint, tokens) for checkpoint in pair)
    same = int(np.sum(logits_TV.argmax(-1) == other_TV.argmax(-1)))
    print(
        f"logits of {len(tokens)} tokens in float32: they differ by at most {np.abs(logits_TV - other_TV).max():.3g}, "
        f"the largest is {np.abs(logits_TV).max():.3g}; the likeliest token is the same at {same} of {len(tokens)} "
        "positions"
    )


def _import(command: Import) -> None:
    _convert(Convert(src=command.hf_model, dst=command.megatron_path, to="megatron", dtype=command.torch_dtype))


def _export(command: Export) -> None:
    job = Convert(
        src=command.megatron_path,
        dst=command.hf_path,
        hf_config=command.hf_model,
        to="hf",
        dtype=command.torch_dtype,
    )
    _convert(job, show_progress=not command.no_progress)


_COMMANDS: dict[str, tuple[type, Callable]] = {
    "inspect": (Inspect, _inspect),
    "verify": (Verify, _verify),
    "import": (Import, _import),
    "export": (Export, _export),
}


def _convert(command: Convert, show_progress: bool = True) -> None:
    from gemma2_jax.convert.files.folder import expand_path
    from gemma2_jax.convert.job import Job
    from gemma2_jax.convert.writing import check_target, write_checkpoint

    target = expand_path(command.dst)
    check_target(target, command.to)  # before a model is downloaded
    source = _open(command.src, command.adapter, command.hf_config, command.drop)
    ranks = command.tp, command.pp
    job = Job(
        source=source, to=command.to, merge=command.merge, dtype=command.dtype, ranks=ranks, reader=command.reader
    )
    for warning in job.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    with _progress_bar(job.size, shown=show_progress) as progress:
        write_checkpoint(job, target, progress)
    print(command_line.escape(f"wrote {target}: {_summarize(job)}"))
    print(*map(command_line.escape, _suggest_use(job, target).split("\n")), sep="\n")


def _open(src: str, adapter: str | None, hf_config: str | None, drop: tuple[str, ...] = ()) -> "Checkpoint":
    from gemma2_jax.convert import describe
    from gemma2_jax.convert.opening import open_checkpoint

    if adapter is None:
        checkpoint = open_checkpoint(src, hf_config=hf_config, drop=drop)
    else:
        checkpoint = open_checkpoint(adapter, base=open_checkpoint(src, hf_config=hf_config, drop=drop))
    print(command_line.escape(f"read {adapter or src} as {describe.describe_checkpoint(checkpoint)}"))
    for note in checkpoint.notes:
        print(command_line.escape(f"note: {note}"))
    return checkpoint


@contextmanager
def _progress_bar(size: int, *, shown: bool = True) -> Iterator[Callable[[float], None]]:
    """A bar of `size` bytes, shown on a terminal only; yields a function that advances it by a number of bytes."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, disable=not (shown and Console().is_terminal)) as bar:
        task = bar.add_task("", total=size)
        yield lambda count: bar.advance(task, count)


def _summarize(job: "Job") -> str:
    from rich.filesize import decimal

    dtypes = sorted({job.written_dtype(path) for path in job.shapes})
    groups = ("merged " if job.merge else "") + " and ".join(job.groups)
    return f"{groups}, {decimal(job.size)} of {' and '.join(dtypes)}"


def _suggest_use(job: "Job", target: Path) -> str:
    base, quoted = job.source.base, shlex.quote(str(target))
    if job.to == "hf":
        return f"load it: transformers.AutoModelForCausalLM.from_pretrained({str(target)!r})"
    if job.to == "peft":
        model = base or "its base model"
        if job.reader == "vllm":
            return f"serve it: {_vllm_command(job, model, target)}"
        rows = _grown_rows(job)
        grown = f" after model.resize_token_embeddings({rows})" if rows else ""
        return f"load it: peft.PeftModel.from_pretrained(model, {str(target)!r}), where model is {model}{grown}"
    if job.to == "gguf":
        return f"run it: llama-cli -m {quoted}, or with Ollama: FROM {target} in a Modelfile"
    if job.to == "gguf-adapter":
        return f"run it: llama-cli -m MODEL.gguf --lora {quoted}, where MODEL.gguf is {base or 'its base model'}"
    if job.to == "megatron":
        return f"train from it with Megatron-Bridge: checkpoint.pretrained_checkpoint={quoted}"
    if job.to == "megatron-adapter":
        return _suggest_adapter_use(base, target)
    if job.to == "megatron-legacy":  # without --finetune it looks for the state of the optimizer and of the RNG
        config = shlex.quote(str(job.source.path)) if job.source.format == "huggingface" else "MODEL"
        return (
            f"load it with Megatron-LM: --load {quoted} --ckpt-format torch --finetune\n"
            f"read it here, as it does not say its config: python -m gemma2_jax.convert inspect {quoted} --hf-config "
            f"{config}"
        )
    if "adapter" in job.groups:
        if "weights" in job.groups:
            return f"load it: gemma2_jax.load({str(target)!r})"
        return f"load it with its model: gemma2_jax.load({base or 'MODEL'!r}, adapter={str(target)!r})"
    rows = _grown_rows(job)
    grown = f" --model.vocab_size {rows}" if rows else ""
    return f"train from it: python -m gemma2_jax.train --config NAME --init {quoted}{grown}"


def _grown_rows(job: "Job") -> int | None:
    """The rows of the embedding, where those of the adapter's model are fewer, or not known and it has its own."""
    source = job.source
    assert source.model is not None
    stored = {part.shapes["embedding"].shape[0] for part in source.sources if "embedding" in part.shapes}
    unknown = source.lacks_base and bool(stored)
    return source.model.vocab_size if stored - {source.model.vocab_size} or unknown else None


def _vllm_command(job: "Job", base: str, target: Path) -> str:
    from gemma2_jax.convert.formats import vllm

    options = ["--enable-lora", "--lora-modules", f"{target.name}={target}"]
    return shlex.join(["vllm", "serve", base, *options, "--max-lora-rank", str(vllm.max_lora_rank(job.adapter))])


def _suggest_adapter_use(base: str, target: Path) -> str:
    from gemma2_jax.convert.writing_megatron import pretrained_checkpoint

    pretrained = pretrained_checkpoint(base, target)
    fields = f"checkpoint.load={target} checkpoint.pretrained_checkpoint={pretrained}"
    if Path(base).expanduser() == pretrained:
        return f"go on with it in Megatron-Bridge: {fields}"
    command = shlex.join(["python", "-m", "gemma2_jax.convert", base or "MODEL", str(pretrained), "--to", "megatron"])
    return f"convert its model for Megatron-Bridge: {command}\ngo on with it there: {fields}"


if __name__ == "__main__":
    main()
