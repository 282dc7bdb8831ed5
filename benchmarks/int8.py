"""What weights in int8 cost in perplexity: of doc strings of Python's standard library, with the tiny model.

    python -m benchmarks.int8 [--checkpoint assets/tiny-gemma2] [--windows 64]

The text is the same in each row, in windows of 256 tokens, each of which is scored by the engine from its second token.
"""

import inspect
import math

from rich.console import Console
from rich.table import Table

from benchmarks.options import make_parser
from gemma2_jax.cluster import platforms

MODULES = ("argparse", "collections", "datetime", "decimal", "fractions", "json", "logging", "random", "statistics")
LENGTH = 256


def read_text() -> str:
    """Doc strings of modules, their classes and functions."""
    parts = []
    for module in map(__import__, MODULES):
        members = [module, *(value for _, value in inspect.getmembers(module))]
        parts += [inspect.getdoc(member) or "" for member in members]
    return "\n\n".join(dict.fromkeys(parts))


def main() -> None:
    parser = make_parser("int8", __doc__)
    parser.add_argument("--checkpoint", default="assets/tiny-gemma2")
    parser.add_argument("--windows", type=int, default=64)
    options = parser.parse_args()
    platforms.prepare_process()
    from gemma2_jax.inference.engine import Engine, Request
    from gemma2_jax.inference.loaded import load_decoder
    from gemma2_jax.inference.source import Source, open_source

    table = Table(title=f"{options.checkpoint}: {options.windows} windows of {LENGTH} tokens", title_justify="left")
    for column in ("weights", "arithmetic", "log-probability a token", "perplexity", "over float32"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    first = None
    for int8, dtype in ((False, "float32"), (False, "bfloat16"), (True, "float32"), (True, "bfloat16")):
        checkpoint, tokenizer = open_source(Source(checkpoint=options.checkpoint))
        tokens = tokenizer.backend_tokenizer.encode(read_text(), add_special_tokens=False).ids
        windows = [tokens[start : start + LENGTH] for start in range(0, options.windows * LENGTH, LENGTH)]
        engine = Engine(load_decoder(checkpoint, dtype, int8=int8), slots=4, context=LENGTH)
        requests = [Request(prompt=window, max_new_tokens=0, echo=True) for window in windows]
        scores = [score.value for request in engine.run(requests) for score in request.prompt_scores]
        mean = sum(scores) / len(scores)
        first = mean if first is None else first
        change = math.exp(first - mean) - 1
        table.add_row("int8" if int8 else dtype, dtype, f"{mean:.4f}", f"{math.exp(-mean):.3f}", f"{change:+.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
