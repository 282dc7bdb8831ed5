"""`python -m gemma2_jax.train --config NAME`: trains what a recipe says. The command line only; `loop` is the run.

Nothing here imports JAX before the arguments are understood, so that `--help`, `--print` and mistakes answer at once.
"""

import contextlib
import errno
import itertools
import os
import re
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro

from gemma2_jax import command_line, config_text, megatron_bridge, recipes
from gemma2_jax.cluster import platforms
from gemma2_jax.config import Config
from gemma2_jax.planning.gpus import find_kind
from gemma2_jax.training.smaller_steps import LargeStepError

PROGRAM = "python -m gemma2_jax.train"
_END_BYTES = 1 << 20  # of metrics.jsonl, in which the last step is looked for
HELP_RECIPE = "tiny_lora"  # whose fields --help shows where no recipe is given


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe, and the run that it becomes."""

    config: str  # recipe: a name in configs/, or a Python file
    # auto: the mesh, the rows of a pass and what is kept of a block, as a search found or predicts them to be fastest
    mesh: Literal["given", "auto"] = "given"
    run: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]


@dataclass(frozen=True, kw_only=True)
class Command(Recipe):
    """Pretrains or fine-tunes Gemma 2.

    The defaults shown are those of the recipe that --config names.

    Fields may also be given as group.field=value.

    The same command on the same --workdir resumes.
    """

    print: bool = False  # show the resolved config, and stop


def parse[C: Recipe](arguments: list[str], command: type[C] = Command, program: str = PROGRAM) -> C:
    """The command that these arguments give. Exits with a message where they are not understood."""
    try:
        arguments = megatron_bridge.translate_arguments(_join_columns(arguments))
        arguments = [f"--{argument}" if re.match(r"[a-z][\w.-]*=", argument) else argument for argument in arguments]
        arguments = [re.sub(r"^--adapter(?=$|=)", "--init-adapter", argument) for argument in arguments]
        recipe = _find_recipe(arguments, program)
        default = command(config=recipe, run=recipes.load_recipe(recipe))
        arguments = command_line.capitalize_booleans(arguments, Config)
    except ValueError as error:
        command_line.exit_usage(str(error), program)
    return command_line.parse(command, arguments, program, default)


def _join_columns(arguments: list[str]) -> list[str]:
    """--data.columns prompt=q as one argument, since prompt=q by itself would be taken for a field."""
    words: list[str] = []
    for argument in arguments:
        if words and words[-1] == "--data.columns":
            words[-1] = f"{words[-1]}={argument}"
        else:
            words.append(argument)
    return words


def main(program: str = PROGRAM) -> None:
    """Parses and trains.

    It ends with 0, or with a status of `command_line` and a sentence; `docs/running.md` lists them.
    """
    command = parse(sys.argv[1:], program=program)
    if command.print:
        _print_config(command.run)
        return
    platforms.restart_with_huge_pages()
    from gemma2_jax.cluster import hosts

    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # until there are steps to trace
    with hosts.end_when_told():
        _train(command.run, lays_out=command.mesh == "auto")


def _train(config: Config, *, lays_out: bool = False) -> None:
    """Trains. Ends the process with a status and a sentence where that is not carried out to its end."""
    from gemma2_jax.cluster import hosts

    workdir, stopped = config.output, ""
    try:
        platforms.prepare_process()
        from gemma2_jax.data import encoding

        encoding.hide_torch()
        from gemma2_jax.training import loop

        with hosts.process_group(config.hosts):
            stopped = loop.train(lay_out(config) if lays_out else config).stopped
    except ImportError:
        if not (stopped := hosts.ignored_signal()):  # else it came while a module in C was imported, which says this
            raise
    except (BrokenPipeError, SystemExit):  # rich raises the latter
        _end_process(command_line.EXIT_CLOSED_PIPE, f"standard output was closed; {describe_interruption(workdir)}")
    except (ValueError, OSError, FloatingPointError) as error:
        _end_process(hosts.exit_status(error), f"error: {_describe_error(error, workdir)}")
    except KeyboardInterrupt as error:
        _end_process(hosts.exit_status(error), describe_interruption(workdir, str(error)))
    if stopped:
        is_interrupt = stopped == hosts.INTERRUPT
        status = command_line.EXIT_INTERRUPTED if is_interrupt else command_line.EXIT_STOPPED
        _end_process(status, describe_interruption(workdir, stopped))


def lay_out(config: Config) -> Config:
    """The run with the layout that the planner chooses for the devices there are; says which, and why.

    Raises ValueError where it knows none.
    """
    import jax

    from gemma2_jax.planning import known_layouts

    config, reason = known_layouts.lay_out(config, jax.device_count(), jax.devices()[0].device_kind)
    if jax.process_index() == 0:
        command_line.notify(f"mesh auto: {reason}")
    return config


def describe_interruption(workdir: Path, reason: str = "") -> str:
    """How far an interrupted run got, which of its checkpoints is kept, and what the same command does next.

    `reason` is what interrupted it, such as SIGTERM.
    """
    folder = workdir / "checkpoints"
    # A checkpoint that is not whole has a longer name.
    saved = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    step = max([_find_last_step(workdir / "metrics.jsonl"), *saved])
    by = f" by {reason}" if reason else ""
    reached = f"interrupted{by} after step {step}" if step else f"interrupted{by} before the first step"
    if not saved:
        return f"{reached}; no checkpoint is kept in {workdir}, and the same command starts from the beginning"
    return f"{reached}; the checkpoint of step {max(saved)} is kept in {folder}, and the same command resumes after it"


def _find_last_step(metrics: Path) -> int:
    """The last step whose loss is at the end of metrics.jsonl; 0 where there is none."""
    if not metrics.is_file():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(metrics.stat().st_size - _END_BYTES, 0))
        lines = file.read().decode(errors="replace").splitlines()
    steps = [step[1] for line in lines if '"loss": ' in line and (step := re.search(r'"step": (\d+)', line))]
    return int(steps[-1]) if steps else 0


def _describe_error(error: Exception, workdir: Path) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"{error.filename or f'{workdir}, or standard output,'} could not be written: {error.strerror}; make room, "
            "or give another --workdir"
        )
    if isinstance(error, LargeStepError) and (gpu := find_kind(error.device_kind)):
        gpus = ["--gpus", str(error.count), "--device", gpu.name]
        command = shlex.join(["python", "-m", "gemma2_jax.plan", *sys.argv[1:], *gpus])
        return f"{error}. On how many of these GPUs it fits, this says: {command}"
    return command_line.describe_error(error) if getattr(error, "filename", None) else str(error)


def _print_config(config: Config) -> None:
    try:
        print(config_text.to_text(config), end="", flush=True)
    except BrokenPipeError:
        command_line.exit_closed_pipe()
    except OSError as error:
        _end_process(1, f"error: the config could not be written to standard output: {error.strerror}")


def _end_process(status: int, message: str) -> NoReturn:
    """Ends this process now. Were the interpreter to end first, a step that a device still computes would abort it."""
    with contextlib.suppress(OSError):  # standard output may be closed, or its disk full
        sys.stdout.flush()
    command_line.notify(command_line.fold(message))
    os._exit(status)


def _find_recipe(arguments: list[str], program: str) -> str:
    """The recipe that --config names, which decides the defaults of the other options, before those are parsed.

    Raises ValueError unless there is one, or help is asked for.
    """
    values = [
        following if argument == "--config" else argument.partition("=")[2]
        for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="")
        if re.match("--config(=|$)", argument)
    ]
    if len(values) > 1:
        given = " and ".join(value or "nothing" for value in values)
        raise ValueError(f"--config is given {len(values)} times, as {given}; give one of them")
    if values and values[0] and not values[0].startswith("-"):
        return values[0]
    if {"--help", "-h"} & {*arguments}:
        return HELP_RECIPE
    names = ", ".join(recipes.recipe_names())
    there_are = f"There are {names}; a Python file with a function config() is one too"
    if arguments and not arguments[0].startswith("-"):
        near = command_line.suggest(arguments[0], recipes.recipe_names())
        raise ValueError(
            f"{arguments[0]} is not an option: a recipe is given as --config NAME{near or '.'} {there_are}"
        )
    raise ValueError(f"a recipe is needed, as in {program} --config {HELP_RECIPE}. {there_are}")


if __name__ == "__main__":
    main()
