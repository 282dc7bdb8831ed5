"""The fastest layouts of the recipes on H100s that are not there, as `plan --search` finds them; no step is run.

    python -m benchmarks.layouts --recipes 27b_sft 27b_lora --gpus 8 16 --limit 4

For each recipe: its own mesh, which is Megatron-Bridge's, on the GPUs that takes, and the best layout that was found on
each number of GPUs, with its memory, bound, estimate and traffic. `planning.known_layouts` has what this printed. What
was compiled is kept in the cache folder, so the same command goes on where it was cut off. A step compiles in half a
minute to minutes.
"""

import math
import sys
from dataclasses import asdict

from benchmarks.options import make_parser
from gemma2_jax import recipes
from gemma2_jax.planning import described_cluster
from gemma2_jax.planning.gpus import H100
from gemma2_jax.planning.layouts import find_own
from gemma2_jax.planning.search import Tried, search_layouts

RECIPES = [f"{size}_{kind}" for kind in ("pretrain", "sft", "lora", "dora") for size in ("2b", "9b", "27b")]
COLUMNS = ("recipe", "GPUs", "mesh", "rows", "kept", "GiB", "bound, s", "estimate, s", "tokens/s a GPU", "GB sent", "")


def count_own_gpus(name: str) -> int:
    """GPUs of a recipe's own mesh."""
    return math.prod(size for size in asdict(recipes.load_recipe(name).mesh).values() if size != -1)


def row(name: str, one: Tried, remark: str) -> str:
    layout, plan = one.prediction.layout, one.plan
    kept = " ".join(layout.kept_outputs) if layout.remat == "block" else layout.remat
    sent = sum(kinds.total() for kinds in plan.traffic.values()) / 1e9
    cells = (name, str(plan.gpus), plan.mesh, str(layout.micro_batch_size), kept, f"{plan.total / 2**30:.1f}")
    times = (f"{plan.bound.total:.2f}", f"{plan.estimate.total:.2f}", f"{plan.token_rate(plan.estimate):,.0f}")
    return f"| {' | '.join((*cells, *times, f'{sent:,.0f}', remark))} |"


def main() -> None:
    parser = make_parser("layouts", __doc__)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="names in configs/")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="numbers of H100s")
    parser.add_argument("--limit", type=int, default=4, help="layouts compiled for each, beside the recipe's own")
    options = parser.parse_args()
    described_cluster.prepare_jax()
    for cells in (COLUMNS, ("---",) * len(COLUMNS)):
        print(f"| {' | '.join(cells)} |")
    for name in options.recipes:
        config, own_gpus = recipes.load_recipe(name), count_own_gpus(name)
        for gpus in options.gpus:
            print(f"searching for {name} on {gpus} GPUs", file=sys.stderr)
            own = find_own(config, gpus) if gpus == own_gpus else None
            try:
                search = search_layouts(config, gpus, H100, options.limit, own)
            except ValueError as error:
                print(f"{name} on {gpus} GPUs: {error}", file=sys.stderr)
                continue
            for one in search.tried:
                if one.prediction.layout == own:
                    print(row(name, one, "the recipe's own"), flush=True)
            if search.ranked:
                print(row(name, search.ranked[0], ""), flush=True)


if __name__ == "__main__":
    main()
