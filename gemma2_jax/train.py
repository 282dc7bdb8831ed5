"""`python -m gemma2_jax.train --config NAME`: trains what a recipe says. The command line only; `loop` is the run.

Nothing here imports JAX before the arguments are understood, so that `--help`, `--print` and mistakes answer at once.
"""

import re
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from gemma2_jax import config as configs
from gemma2_jax.cluster import platforms
from gemma2_jax.config import Config

DEFAULT_RECIPE = "tiny_lora"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe, and the run that it becomes."""

    config: str = DEFAULT_RECIPE  # recipe: a name in configs/, or a Python file
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
    arguments = [f"--{argument}" if re.match(r"[a-z][\w.-]*=", argument) else argument for argument in arguments]
    arguments = [re.sub(r"^--adapter(?=$|=)", "--init-adapter", argument) for argument in arguments]
    recipe = _option(arguments, "--config") or DEFAULT_RECIPE
    try:
        default = command(config=recipe, run=configs.load_recipe(recipe))
        return tyro.cli(command, args=arguments, prog=f"python -m gemma2_jax.{name}", default=default)
    except ValueError as error:
        sys.exit(f"error: {error}")


def main() -> None:
    command = parse(sys.argv[1:])
    if command.print:
        print(configs.to_text(command.run), end="")
        return
    platforms.prepare_process()
    from gemma2_jax.cluster import hosts
    from gemma2_jax.training import loop

    try:
        with hosts.process_group(command.run.hosts):
            loop.train(command.run)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command resumes after its newest checkpoint", file=sys.stderr)
        sys.exit(130)


def _option(arguments: list[str], name: str) -> str | None:
    """The value of an option that decides the defaults of the others, before those are parsed."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == name:
            return following
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


if __name__ == "__main__":
    main()
