"""What a search for layouts prints: how far it is, a table of what was compiled, and the command line of each."""

from rich.console import Console
from rich.table import Column, Table

from gemma2_jax.config import Config
from gemma2_jax.planning.gpus import Gpu
from gemma2_jax.planning.layouts import Layout
from gemma2_jax.planning.report import format_gib
from gemma2_jax.planning.search import Search, search_layouts
from gemma2_jax.training.progress import progress_bar


def search_and_print(
    console: Console, config: Config, gpus: int, device: Gpu, limit: int, own: Layout | None
) -> Search:
    """Searches with a bar on the way, and prints what was found."""
    with progress_bar(console, "layouts compiled", hidden=not console.is_terminal) as bar:
        task = bar.add_task("", total=limit + bool(own), text="")

        def show(search: Search) -> None:
            best = search.ranked[0] if search.ranked else None
            text = f"best {best.plan.estimate.total:,.3f} s: {best.plan.mesh}" if best else ""
            bar.update(task, completed=len(search.tried) + len(search.failed), text=text)

        search = search_layouts(config, gpus, device, limit, own, show)
    print_search(console, search, own)
    return search


def print_search(console: Console, search: Search, own: Layout | None) -> None:
    """Prints a table of the layouts that fit, and what became of the others."""
    columns = ("mesh", "rows", "remat", Column("GiB", justify="right"), Column("bound, s", justify="right"))
    table = Table(
        "", *columns, *(Column(name, justify="right") for name in ("estimate, s", "tokens/s a GPU", "GB sent"))
    )
    for number, one in enumerate(search.ranked, 1):
        layout, plan = one.prediction.layout, one.plan
        remat = f"{layout.remat}, {' '.join(layout.kept_outputs)}" if layout.kept_outputs else layout.remat
        sent = sum(kinds.total() for kinds in plan.traffic.values())
        table.add_row(
            f"{number}{' (as given)' if layout == own else ''}",
            plan.mesh,
            str(layout.micro_batch_size),
            remat,
            format_gib(plan.total),
            f"{plan.bound.total:,.3f}",
            f"{plan.estimate.total:,.3f}",
            f"{plan.token_rate(plan.estimate):,.0f}",
            f"{sent / 1e9:,.1f}",
        )
    console.print(table, highlight=False)
    for sentence in describe_rest(search):
        console.print(sentence, highlight=False, markup=False)
    for number, one in enumerate(search.ranked, 1):
        options = " ".join(one.prediction.layout.list_options(search.config))
        console.print(f"{number}  {options or 'as given'}", highlight=False, markup=False, soft_wrap=True)


def describe_rest(search: Search) -> list[str]:
    """Sentences on layouts that are not in the table."""
    said = []
    large = [one for one in search.tried if not one.plan.fits]
    for one in large:
        said.append(f"does not fit, with {format_gib(one.plan.total)} GiB: {one.prediction.layout}")
    said += [f"was not compiled: {layout}: {reason}" for layout, reason in search.failed.items()]
    if search.pruned:
        said.append(f"{search.pruned} layouts have a predicted bound above the best estimate")
    if search.left:
        said.append(f"{len(search.left)} layouts were predicted to be slower, or not to fit, and not compiled")
    return said
