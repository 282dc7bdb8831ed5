"""What memory allows of generation on H100s, read off the engine's step, compiled for GPUs that are not there.

    python -m benchmarks.decode_bound [--gpus 1] [--context 8192] [--layers 4]

A step reads each weight once for all rows, and the keys and values of each row: with the bandwidth of an H100's memory
that is a bound on tokens per second. It is no estimate, and nothing is measured. "read" is what the compiled step reads
and writes, and "excess" that over weights and full rows of the cache. With --layers the models have so many layers, and
compile in seconds.
"""

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from benchmarks.options import make_parser

ROWS = (1, 8, 64)


def main() -> None:
    parser = make_parser("decode_bound", __doc__)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    from gemma2_jax.planning import described_cluster

    described_cluster.prepare_jax()
    from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_9B, GEMMA2_27B
    from gemma2_jax.planning.compiled_decoding import compile_decoding

    layers = "" if options.layers is None else f", {options.layers} layers"
    table = Table(
        title=f"a step compiled for {options.gpus} x H100 SXM, bfloat16, rows of {options.context} tokens{layers}",
        title_justify="left",
    )
    for column in ("model", "rows", "weights, GB", "cache, GB", "read, GB", "excess", "tokens/s at most"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, config in (("2b", GEMMA2_2B), ("9b", GEMMA2_9B), ("27b", GEMMA2_27B)):
        config = config if options.layers is None else replace(config, layers=options.layers)
        for rows in ROWS:
            found = compile_decoding(config, gpus=options.gpus, rows=rows, context=options.context)
            numbers = (found.weights / 1e9, found.cache / 1e9, found.memory_traffic.total() / 1e9)
            table.add_row(
                name, str(rows), *(f"{x:.2f}" for x in numbers), f"{found.excess:.3f}", f"{found.most_tokens:,.0f}"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
