"""A plan whose step is described by its sizes, for tests of what is made of plans: nothing is compiled."""

from collections.abc import Sequence

from gemma2_jax import recipes
from gemma2_jax.model_config import GEMMA2_2B
from gemma2_jax.planning.dense_step import DenseStep, describe_gemma
from gemma2_jax.planning.gpus import H100, Gpu
from gemma2_jax.planning.memory import Buffer, Peak
from gemma2_jax.planning.report import Plan
from gemma2_jax.planning.schedule import Item, Loop, Send, list_work, sum_flops
from gemma2_jax.planning.speed import time_step
from gemma2_jax.planning.traffic import Collective

GIB = 2**30
SIZES = {"data": 2, "stage": 1, "fsdp": 8, "context": 1, "tensor": 1}
REDUCED = 2_000_000_000  # bytes that a GPU sends to the other host
MEMORY = {"trained weights": 2 * GIB, "optimizer": 4 * GIB, "batch": 4096, "temporaries": 3 * GIB, "results": 64}


def list_sends(items: Sequence[Item], times: int = 1) -> list[Collective]:
    """The collectives of a schedule."""
    found = []
    for item in items:
        if isinstance(item, Loop):
            found += list_sends(item.items, times * item.times)
        elif isinstance(item, Send):
            found.append(
                Collective(kind=item.kind, axes=item.axes, sent=item.sent, times=times, loop="", where="layers")
            )
    return found


def make_plan(device: Gpu = H100) -> Plan:
    """A step of 2B over two hosts: weights are gathered within each, and gradients meet between them."""
    step = DenseStep(model=describe_gemma(GEMMA2_2B), rows=2, length=2048, passes=4, fsdp=8)
    reduce = Send(name="gradients", kind="all-reduce", axes="data", sent=REDUCED, is_async=False)
    items = (*step.describe(), reduce)
    flops: dict[str, dict[str, int]] = {}
    for (part, pass_name), count in sum_flops(items).items():
        flops.setdefault(part, {})[pass_name] = count
    bound, estimate = time_step(items, device, SIZES)
    owners = {"gradients": 2 * GIB, "other temporaries": GIB - 1024, "gaps between buffers": 1024}
    buffer = Buffer(
        owner="gradients", size=GIB, shape="f32[26,288,9216]", operation="jit(train_step)/backward/layers/<dot>"
    )
    return Plan(
        config=recipes.load_recipe("2b_sft"),
        device=device,
        gpus=16,
        mesh="data 2 x fsdp 8",
        mesh_sizes=SIZES,
        memory=MEMORY,
        total=sum(MEMORY.values()) + 8,
        peak=Peak(where="backward", owners=owners, buffers=(buffer,)),
        lower_seconds=1.0,
        compile_seconds=2.0,
        layers_per_stage=None,
        collectives=tuple(list_sends(items)),
        flops=flops,
        memory_traffic=round(sum(work.memory * times for work, times in list_work(items))),
        bound=bound,
        estimate=estimate,
    )
