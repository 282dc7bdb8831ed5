"""`python -m gemma2_jax.train --config NAME`: trains what a recipe says. The command line only; `loop` is the run.

Nothing here imports JAX before the arguments are understood, so that `--help`, `--print` and mistakes answer at once.
"""

import itertools
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from gemma2_jax import config as configs, megatron_bridge
from gemma2_jax.cluster import platforms
from gemma2_jax.config import Config

HELP_RECIPE = "tiny_lora"  # whose fields --help shows where no recipe is given


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe, and the run that it becomes."""

    config: str  # recipe: a name in configs/, or a Python file
    run: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]


@dataclass(frozen=True, kw_only=True)
class Command(Recipe):
    """Pretrains or fine-tunes Gemma 2.

    The defaults shown are those of the recipe that --config names. Fields may also be given as group.field=value.
    The same command on the same --workdir resumes.
    """

    print: bool = False  # show the resolved config, and stop


def parse[C: Recipe](arguments: list[str], command: type[C] = Command, name: str = "train") -> C:
    """The command that these arguments give. Exits with a message where they are not understood."""
    try:
        arguments = megatron_bridge.translate_arguments(arguments)
        arguments = [f"--{argument}" if re.match(r"[a-z][\w.-]*=", argument) else argument for argument in arguments]
        arguments = [re.sub(r"^--adapter(?=$|=)", "--init-adapter", argument) for argument in arguments]
        recipe = _find_option(arguments, "--config")
        if recipe is None and not {"--help", "-h"} & {*arguments}:
            _ask_for_recipe(f"python -m gemma2_jax.{name}")
        recipe = recipe or HELP_RECIPE
        default = command(config=recipe, run=configs.load_recipe(recipe))
        return tyro.cli(command, args=arguments, prog=f"python -m gemma2_jax.{name}", default=default)
    except ValueError as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """Parses, trains; ends with 0, 1 after an error that it names, 2 for arguments, or 130 after Ctrl-C or SIGTERM."""
    command = parse(sys.argv[1:])
    if command.print:
        print(configs.to_text(command.run), end="")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        platforms.prepare_process()
        from gemma2_jax.cluster import hosts
        from gemma2_jax.training import loop

        with hosts.process_group(command.run.hosts):
            loop.train(command.run)
    except (ValueError, OSError, FloatingPointError) as error:
        _end_process(1, f"error: {error}")
    except KeyboardInterrupt:
        _end_process(130, describe_interruption(command.run.output))


def describe_interruption(workdir: Path) -> str:
    """How far an interrupted run got, which of its checkpoints is kept, and what the same command does next."""
    metrics, folder = workdir / "metrics.jsonl", workdir / "checkpoints"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    steps = [step[1] for line in lines if '"loss": ' in line and (step := re.search(r'"step": (\d+)', line))]
    reached = f"interrupted after step {steps[-1]}" if steps else "interrupted before the first step"
    # A checkpoint that is not whole has a longer name.
    saved = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    if not saved:
        return f"{reached}; no checkpoint is kept in {workdir}, and the same command starts from the beginning"
    return f"{reached}; the checkpoint of step {max(saved)} is kept in {folder}, and the same command resumes after it"


def _end_process(status: int, message: str) -> NoReturn:
    """Ends this process now. Were the interpreter to end first, a step that a device still computes would abort it."""
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(status)


def _ask_for_recipe(command: str) -> NoReturn:
    """Says what a command without a recipe lacks, and exits with the status of a mistake in the arguments."""
    print(
        f"error: a recipe is needed, as in {command} --config {HELP_RECIPE}. There are "
        f"{', '.join(configs.recipe_names())}; a Python file with a function config() is one too. --help lists the "
        "options",
        file=sys.stderr,
    )
    sys.exit(2)


def _find_option(arguments: list[str], name: str) -> str | None:
    """The value of an option that decides the defaults of the others, before those are parsed."""
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument == name:
            return following
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


if __name__ == "__main__":
    main()
