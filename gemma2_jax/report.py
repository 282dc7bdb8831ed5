"""`python -m gemma2_jax.report RUN [RUN ...]`: runs as one HTML page, with pictures, for any browser.

The command line only: `reporting` reads, draws and writes. It works while a run is under way, and needs no JAX.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gemma2_jax import command_line

PROGRAM = "python -m gemma2_jax.report"


@dataclass(frozen=True, kw_only=True)
class Command:
    """Writes a page of runs: losses, speed, time, memory, events, samples, configs.

    Of several runs the lines are drawn together, and a table compares the configs.
    """

    runs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN [RUN ...]", help="working directories of runs"),
    ]
    output: str = ""  # the page that is written; empty: report.html in the folder of the first run

    def __post_init__(self) -> None:
        if not self.runs or "" in self.runs:
            raise ValueError("a run is needed: the --workdir of a training run, or several of them")


def main(program: str = PROGRAM) -> None:
    """Parses, reads the runs, and writes the page; exits with a sentence where that cannot be done."""
    command = command_line.parse(Command, sys.argv[1:], program)
    with command_line.exit_with_sentence():
        from gemma2_jax.reporting import figures, page, runs

        figures.check_plotly()

        folders = [Path(folder) for folder in dict.fromkeys(command.runs)]
        output = Path(command.output) if command.output else folders[0] / "report.html"
        if output.is_dir():
            raise ValueError(
                f"{output} is a folder, and the page is a file; give its name, as --output {output}/NAME.html"
            )
        page.write_report(runs.name_runs([runs.read_run(folder) for folder in folders]), output)
        print(f"{output} ({output.stat().st_size / 1e6:.1f} MB) opens in any browser, without a network")


if __name__ == "__main__":
    main()
