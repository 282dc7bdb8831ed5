"""`python -m gemma2_jax.check --config NAME`: looks at a machine before a run is paid for.

The command line only: `planning.checkup` does the work. Start it as the run will be, one process a host. Nothing here
imports JAX before the arguments are understood.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from gemma2_jax import command_line
from gemma2_jax.cluster import platforms
from gemma2_jax.train import HELP_RECIPE, Recipe, lay_out, parse

if TYPE_CHECKING:
    from gemma2_jax.cluster.findings import Row

_STYLES = {"ok": "green", "slow": "yellow", "wrong": "bold red", "skipped": "dim"}


@dataclass(frozen=True, kw_only=True)
class Command(Recipe):
    """Looks at a machine before a run is paid for: GPUs, kernels, links, steps.

    The defaults shown are those of the recipe that --config names, or tiny_lora.

    Fields may also be given as group.field=value.

    It ends with 1 where something is wrong.
    """

    tune: bool = False  # time the attention kernels with each legal tile, and keep the fastest for runs to take
    json: Path | None = None  # also write the table here


def main(program: str = "python -m gemma2_jax.check") -> None:
    """Parses, checks and prints; exits with a status that says whether something is wrong."""
    arguments = sys.argv[1:]
    if not any(argument.partition("=")[0] == "--config" for argument in arguments):
        arguments = ["--config", HELP_RECIPE, *arguments]
    command = parse(arguments, Command, program)
    from gemma2_jax.cluster import hosts

    with hosts.end_when_told(), command_line.exit_with_sentence():
        platforms.prepare_process()
        from gemma2_jax.data import encoding

        encoding.hide_torch()
        from gemma2_jax.planning import checkup

        with hosts.process_group(command.run.hosts):
            import jax

            run = lay_out(command.run) if command.mesh == "auto" else command.run
            rows = checkup.run_checks(run, tunes=command.tune)
            if jax.process_index() == 0:
                print_rows(rows)
                if command.json:
                    write_rows(command.json, rows)
    if any(row.verdict == "wrong" for row in rows):
        sys.exit(command_line.EXIT_FAILED)


def print_rows(rows: "list[Row]") -> None:
    """Prints the table, and under it how many rows are as they should be."""
    console = Console()
    if not console.is_terminal:
        console.width = 200
    table = Table("subject", "found", "verdict", "what to do")
    for row in rows:
        style = _STYLES[row.verdict]
        cells = [
            command_line.escape(text).replace("[", r"\[") for text in (row.subject, row.found, row.judgment, row.advice)
        ]
        cells[2] = f"[{style}]{cells[2]}[/{style}]"
        table.add_row(*cells)
    console.print(table, highlight=False)
    counts = [(verdict, sum(row.verdict == verdict for row in rows)) for verdict in _STYLES]
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts if count), highlight=False)


def write_rows(path: Path, rows: "list[Row]") -> None:
    """Writes the rows as JSON; the file appears whole."""
    complete = path.with_name(f"{path.name}.tmp")
    complete.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    complete.replace(path)


if __name__ == "__main__":
    main()
