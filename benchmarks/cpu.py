"""Training steps here and with transformers and peft, on this CPU, in one run: speed and memory.

    python -m benchmarks.cpu

The tiny and the small model are trained on 16 rows of 256 tokens a step, the medium one on 4 of 512. Each side of each
case is a process of its own, one after another, so that its peak memory is its own and neither waits for the other's
threads. Both have huge pages for memory, as the command that trains takes them.
"""

import multiprocessing
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import training
from benchmarks.options import make_parser
from benchmarks.peer import MODELS, save_weights
from gemma2_jax.cluster import platforms


def run_in_process(function: Callable, *arguments):
    """(result, peak resident MiB) of a call in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measured, (function, *arguments))


def _measured(function: Callable, *arguments):
    platforms.prepare_process(cpu=True, cache=False)
    result = function(*arguments)
    return result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = make_parser("cpu", __doc__)
    names = [name.partition(",")[0] for name in MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    chosen = parser.parse_args().models
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # as `train` has it; the peer gains too
    console = Console()
    packages = " ".join(f"{name} {version(name)}" for name in ("jax", "torch", "transformers", "peft"))
    table = Table(title=f"float32 on {os.cpu_count()} CPU cores; {packages}", title_justify="left", width=118)
    for column in ("case", "here, tokens/s", "peer, tokens/s", "ratio", "here, MiB", "peer, MiB", "agreement"):
        table.add_column(column, justify="left" if column == "case" else "right")
    with tempfile.TemporaryDirectory() as folder:
        for model in (name for name in MODELS if name.partition(",")[0] in chosen):
            weights = Path(folder) / f"{model}.npz"
            run_in_process(save_weights, MODELS[model], weights)
            for kind in ("sft", "lora"):
                sides = [run_in_process(training.measure, side, model, kind, weights) for side in SIDES[training]]
                losses = np.array([side[0][1] for side in sides])
                add(
                    table, f"{model}: training, {kind}", sides, f"loss within {np.abs(losses[0] - losses[1]).max():.1e}"
                )
    console.print(table)


SIDES = {
    training: (training.ours, training.transformers),
}


def add(table: Table, case: str, sides: list, agreement: str) -> None:
    (here, _), here_memory = sides[0]
    (peer, _), peer_memory = sides[1]
    speeds = f"{here:,.0f}", f"{peer:,.0f}", f"{here / peer:.2f}"
    print(f"{case}: {' and '.join(speeds[:2])} tokens/s", file=sys.stderr)
    table.add_row(case, *speeds, f"{here_memory:,.0f}", f"{peer_memory:,.0f}", agreement)


if __name__ == "__main__":
    main()
