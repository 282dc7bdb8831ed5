"""The layouts that searches found for the recipes on H100s, and the choice of one for a run: `--mesh auto`.

The table is the best of what `python -m benchmarks.layouts --gpus 8 16 --limit 3` printed, and for 9b_sft on 8 GPUs of
what an earlier search did, since the predictions of today put that layout too low to be tried. A run that is not in
it, or other GPUs, take the layout that is predicted to be the fastest (`layouts`); nothing is compiled for that.
"""

from __future__ import annotations

from dataclasses import replace

from gemma2_jax import recipes
from gemma2_jax.config import Config, KeptOutput, MeshConfig
from gemma2_jax.planning.gpus import GPUS, Gpu
from gemma2_jax.planning.layouts import Layout, is_divisible, list_predictions

_DEVICES = ("h100",)


def _known(rows: int, *kept: KeptOutput, **axes: int) -> Layout:
    """A layout that keeps these outputs of a block; without any, all that its backward pass needs."""
    mesh, remat = MeshConfig(**{"data": 1, **axes}), "block" if kept else "none"
    return Layout(mesh=mesh, micro_batch_size=rows, remat=remat, kept_outputs=kept)


_PRODUCTS: tuple[KeptOutput, ...] = ("q", "k", "v", "attention", "o", "gate", "up", "down")


# By recipe and number of GPUs.
KNOWN: dict[tuple[str, int], Layout] = {
    ("2b_pretrain", 8): _known(4, *_PRODUCTS, fsdp=8),
    ("2b_pretrain", 16): _known(2, *_PRODUCTS, fsdp=16),
    ("9b_pretrain", 8): _known(1, *_PRODUCTS, fsdp=8),
    ("9b_pretrain", 16): _known(2, *_PRODUCTS, fsdp=16),
    ("27b_pretrain", 8): _known(1, "q", "k", "o", "down", fsdp=4, tensor=2),
    ("27b_pretrain", 16): _known(1, *_PRODUCTS, fsdp=8, tensor=2),
    ("2b_sft", 8): _known(4, *_PRODUCTS, data=2, fsdp=4),
    ("2b_sft", 16): _known(8, *_PRODUCTS, fsdp=16),
    ("9b_sft", 8): _known(4, *_PRODUCTS, fsdp=8),
    ("9b_sft", 16): _known(2, *_PRODUCTS, data=2, fsdp=8),
    ("27b_sft", 8): _known(1, "q", "k", "v", "attention", "o", "gate", "down", fsdp=4, tensor=2),
    ("27b_sft", 16): _known(2, *_PRODUCTS, fsdp=8, context=2),
    ("2b_lora", 8): _known(1, data=8),
    ("2b_lora", 16): _known(1, data=16),
    ("9b_lora", 8): _known(1, *_PRODUCTS, fsdp=8),
    ("9b_lora", 16): _known(1, *_PRODUCTS, data=2, fsdp=8),
    ("27b_lora", 8): _known(1, *_PRODUCTS, fsdp=8),
    ("27b_lora", 16): _known(1, *_PRODUCTS, data=2, fsdp=8),
}


def lay_out(config: Config, gpus: int, device_kind: str) -> tuple[Config, str]:
    """A run with the layout that is chosen for so many devices of a kind, as JAX names it, and why it is that.

    Raises ValueError where none is known and none can be predicted.
    """
    device = next((gpu for gpu in GPUS.values() if gpu.device_kind == device_kind), None)
    if device is not None:
        layout, reason = choose_layout(config, gpus, device)
        return layout.apply(config), f"{layout}: {reason}"
    if gpus == 1:
        return replace(config, mesh=MeshConfig(data=1)), f"one {device_kind}, of which the planner knows nothing more"
    raise ValueError(
        f"mesh is auto, and the planner knows no {device_kind}, only {', '.join(GPUS)}; give the axes of the mesh, "
        f"such as --mesh.fsdp {gpus}"
    )


def choose_layout(config: Config, gpus: int, device: Gpu) -> tuple[Layout, str]:
    """The layout for a run on so many GPUs, from the table or predicted, and why it is that.

    Raises ValueError where none can fit.
    """
    if device in (GPUS[name] for name in _DEVICES):
        for (recipe, count), layout in KNOWN.items():
            is_meant = count == gpus and is_same_work(config, recipes.load_recipe(recipe))
            if is_meant and is_divisible(config, layout.mesh, layout.micro_batch_size):
                return layout, f"a search found it for {recipe} on {gpus} x {device.title}"
    return predict_layout(config, gpus, device)


def predict_layout(config: Config, gpus: int, device: Gpu) -> tuple[Layout, str]:
    """The layout that is predicted to be the fastest. Raises ValueError where none can fit."""
    predictions = list_predictions(config, gpus, device)
    if not predictions:
        raise ValueError(
            f"mesh is auto, and no layout of this run over {gpus} x {device.title} can fit, or its rows do not divide "
            "over them; use more GPUs, or another train.global_batch_size"
        )
    return predictions[0].layout, (
        f"predicted to be the fastest of {len(predictions)} on {gpus} x {device.title}, and not compiled; "
        "python -m gemma2_jax.plan --search 12 compiles"
    )


def is_same_work(config: Config, other: Config) -> bool:
    """Whether two runs differ at most in their layout, data, optimizer and what is kept of them."""

    def work(one: Config) -> tuple:
        train, compute, adapter = one.train, one.compute, one.adapter
        return (
            one.model,
            replace(adapter, alpha=1.0),
            (train.sequence_length, train.global_batch_size),
            tuple(getattr(compute, name) for name in ("dtype", "trained_dtype", "frozen_dtype", "loss_chunk")),
        )

    return work(config) == work(other)
