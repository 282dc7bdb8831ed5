"""How good the planner's bound and estimate are, on steps of like models that others have timed on H100s.

    python -m benchmarks.published_steps

Nothing is run: the steps are described to the formulas that `plan` uses (`planning.dense_step`, `planning.speed`), once
without recomputation and once with all layers computed again in the backward pass, as not every source says which it
did. The bound is of the former. Sources:

- Llama 2 7B: 0.721 s a step of 2 rows a GPU, JAX, FSDP over 8.
- Llama 3.1 8B: TorchTitan (arXiv:2410.06511), FSDP over 8, 2 rows a GPU, torch.compile, half of it recomputed.
- LoRA on Llama 3 8B and Qwen2.5 32B: NVIDIA's NeMo AutoModel, performance summary, micro batches of 2; rank 8 is taken.
"""

from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from benchmarks.options import make_parser
from gemma2_jax.planning.dense_step import DenseModel, DenseStep
from gemma2_jax.planning.gpus import H100
from gemma2_jax.planning.speed import StepTime, time_step

LLAMA2_7B = DenseModel(width=4096, mlp_width=11008, heads=32, kv_heads=32, head_width=128, layers=32, vocab_size=32_000)
LLAMA3_8B = replace(LLAMA2_7B, mlp_width=14336, kv_heads=8, vocab_size=128_256)
QWEN_32B = DenseModel(width=5120, mlp_width=27648, heads=40, kv_heads=8, head_width=128, layers=64, vocab_size=152_064)
_LORA = {"rank": 8, "adapted": ("attention/qkv", "attention/o", "mlp/gate_up", "mlp/down")}
BAND = (0.55, 1.15)  # the estimates over the published times lie within


@dataclass(frozen=True, kw_only=True)
class Published:
    """A step that others have timed."""

    name: str
    step: DenseStep
    seconds: float

    def time(self, remat: str) -> tuple[StepTime, StepTime]:
        """The bound and the estimate, with remat "none" or "block"."""
        step = replace(self.step, remat=remat)
        return time_step(step.describe(), H100, step.mesh)


def by_rate(name: str, step: DenseStep, rate: float) -> Published:
    """A step by the tokens per second and GPU that were published."""
    return Published(name=name, step=step, seconds=step.tokens * step.passes / step.tensor / rate)


PUBLISHED = (
    Published(
        name="Llama 2 7B, full, 8 GPUs",
        step=DenseStep(model=LLAMA2_7B, rows=2, length=4096, fsdp=8, attention_products=5),
        seconds=0.721,
    ),
    by_rate(
        "Llama 3.1 8B, full, 8 GPUs",
        DenseStep(model=LLAMA3_8B, rows=2, length=8192, fsdp=8, attention_products=5),
        6_667,
    ),
    by_rate(
        "Llama 3 8B, LoRA, 1 GPU",
        DenseStep(model=LLAMA3_8B, rows=2, length=4096, passes=16, attention_products=5, **_LORA),
        12_472.87,
    ),
    by_rate(
        "Qwen2.5 32B, LoRA, tensor 2 x fsdp 4",
        DenseStep(model=QWEN_32B, rows=2, length=4096, passes=4, fsdp=4, tensor=2, attention_products=5, **_LORA),
        2_250.31,
    ),
)


def main() -> None:
    make_parser("published_steps", __doc__).parse_args()
    columns = ("step", "published, s", "bound, s", "estimate, s", "recomputing, s", "estimates / published")
    table = Table()
    rows = []
    for one in PUBLISHED:
        (bound, estimate), (_, recomputing) = one.time("none"), one.time("block")
        shares = " to ".join(f"{time.total / one.seconds:.2f}" for time in (estimate, recomputing))
        seconds = (one.seconds, bound.total, estimate.total, recomputing.total)
        rows.append((one.name, *(f"{value:.3f}" for value in seconds), shares))
    for column in columns:
        table.add_column(column, justify="left" if column == "step" else "right")
    for cells in rows:
        table.add_row(*cells)
    Console(width=120).print(table)
    for cells in (columns, ("---",) * len(columns), *rows):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
