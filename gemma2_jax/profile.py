"""`python -m gemma2_jax.profile RUN`: where the time of a run's traced steps went.

The command line only: `training.profile_tables` reads and prints. Nothing here imports JAX before the arguments are
understood, and no device is used.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gemma2_jax import command_line


@dataclass(frozen=True, kw_only=True)
class Command:
    """Prints the time of traced steps by scope and by operation, and that of waiting.

    Steps are traced by train --profile.steps 3.

    A run under way traces some at SIGUSR2, or once it has a file profile.request.
    """

    run: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN", help="working directory of a run, or a folder in it; its newest trace is read"),
    ]

    def __post_init__(self) -> None:
        command_line.check_paths(self, "run")


def main(program: str = "python -m gemma2_jax.profile") -> None:
    """Parses, reads and prints; exits with a sentence where that cannot be done."""
    command = command_line.parse(Command, sys.argv[1:], program)
    from gemma2_jax.cluster import platforms

    platforms.prepare_process(cpu=True, cache=False)
    from gemma2_jax.training import profile_tables

    with command_line.exit_with_sentence():
        folder = profile_tables.find_trace(Path(command.run))
        profile_tables.print_tables(profile_tables.read_profile(folder))


if __name__ == "__main__":
    main()
