"""Draws the pictures of the documentation: `python docs/assets/draw.py [RUN]`, from the repository's root.

Memory is drawn from the table in docs/parallelism.md, and the loss from the folder of a run (runs/tiny_lora).
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
INK, BLUE, ORANGE, GREEN, PALE = "#263238", "#3f51b5", "#ef8a17", "#2e7d32", "#e8eaf6"
USABLE_GIB = 75.15
# Rooms from the commands down to the config, with what stands under the name.
ROOMS = (
    (("commands", "train  generate  plan"),),
    (("megatron_bridge", "Megatron-Bridge's names for ours"),),
    (("api", "the front door: load, train, ..."),),
    (("planning", "steps for GPUs that are not there"),),
    (("training", "step, pipeline, optimizer, loop"),),
    (("inference", "prefill, decode, sample"),),
    (("convert", "formats, files, checkpoints"),),
    (("data", "documents to batches"), ("cluster", "processes of one run")),
    (("model", "Gemma 2, LoRA, loss, attention"),),
    (("kernels", "attention on Hopper"),),
    (("mesh", "devices and what must divide"),),
    (("dims", "one letter per dimension"),),
    (("config", "every choice of a run"),),
)
plt.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "svg.hashsalt": "gemma2_jax"})


def save(figure, name: str) -> None:
    """Writes a picture that is the same for the same input."""
    figure.savefig(
        HERE / name, bbox_inches="tight", facecolor="white", metadata={"Date": None} if ".svg" in name else {}
    )
    plt.close(figure)


def memory_rows() -> list[tuple[str, float, float]]:
    """(recipe and GPUs, state, temporaries) of the table "On the fewest GPUs"."""
    page = (HERE.parent / "parallelism.md").read_text(encoding="utf-8").split("### ")[2]
    rows = [
        line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| 2") or line.startswith("| 9")
    ]
    return [
        (f"{name}, {gpus} GPU{'s' * (gpus != '1')}", float(state), float(rest))
        for name, _, gpus, state, rest, _ in rows
    ]


def draw_memory() -> None:
    rows = memory_rows()[::-1]
    figure, axes = plt.subplots(figsize=(8, 4.6))
    names, state, rest = zip(*rows, strict=True)
    axes.barh(names, state, color=BLUE, label="state: weights and optimizer")
    axes.barh(names, rest, left=state, color=ORANGE, label="temporaries of the step")
    axes.axvline(USABLE_GIB, color=INK, linestyle="--", linewidth=1)
    axes.text(USABLE_GIB - 0.6, -0.15, f"{USABLE_GIB} GiB\nof an H100", ha="right", va="bottom", fontsize=9)
    axes.set_xlabel("GiB on each GPU")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=2, frameon=False)
    save(figure, "memory.svg")


def draw_visible_keys() -> None:
    length, window = 24, 8
    query, key = np.arange(length)[:, None], np.arange(length)
    document = np.repeat([0, 1, 2], [7, 12, 5])
    causal, near = key <= query, query - key < window
    packed = document[:, None] == document
    pictures = {
        "global layer": causal,
        "local layer": causal & near,
        "local layer, three documents packed": causal & near & packed,
    }
    figure, all_axes = plt.subplots(1, 3, figsize=(9, 3.3))
    for axes, (title, visible) in zip(all_axes, pictures.items(), strict=True):
        axes.imshow(visible, cmap=matplotlib.colors.ListedColormap([PALE, BLUE]), interpolation="nearest")
        axes.set_xticks(np.arange(length) - 0.5, minor=True)
        axes.set_yticks(np.arange(length) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="both", length=0, labelleft=False, labelbottom=False)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("key")
        axes.spines[:].set_visible(False)
    all_axes[0].set_ylabel("query")
    save(figure, "visible-keys.svg")


def draw_rooms() -> None:
    figure, axes = plt.subplots(figsize=(7, 7.4))
    height, gap = 0.72, 1.0
    for floor, rooms in enumerate(reversed(ROOMS)):
        width = (8 - 0.3 * (len(rooms) - 1)) / len(rooms)
        for place, (name, below) in enumerate(rooms):
            x, y = place * (width + 0.3), floor * gap
            box = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02", facecolor=PALE, edgecolor=BLUE)
            axes.add_patch(box)
            axes.text(x + width / 2, y + 0.48, name, ha="center", va="center", fontsize=11, weight="bold")
            axes.text(x + width / 2, y + 0.19, below, ha="center", va="center", fontsize=8.5)
    arrow = dict(arrowstyle="-|>", color=ORANGE, linewidth=2.5, mutation_scale=20)
    axes.annotate("", xy=(8.6, 0), xytext=(8.6, (len(ROOMS) - 1) * gap + height), arrowprops=arrow)
    axes.text(8.75, len(ROOMS) * gap / 2, "may import", rotation=270, va="center", color=ORANGE, fontsize=11)
    axes.set_xlim(-0.2, 9.3)
    axes.set_ylim(-0.2, len(ROOMS) * gap)
    axes.axis("off")
    save(figure, "rooms.svg")


def draw_loss(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure, axes = plt.subplots(figsize=(7, 3))
    axes.plot(*zip(*steps, strict=True), color=BLUE, linewidth=1.2, label="each step")
    axes.plot(*zip(*held_out, strict=True), "o-", color=ORANGE, label="held-out documents")
    axes.set_xlabel("step of tiny_lora")
    axes.set_ylabel("nats a token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save(figure, "tiny-lora.svg")


def main() -> None:
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/tiny_lora")
    draw_memory()
    draw_visible_keys()
    draw_rooms()
    if run.is_dir():
        draw_loss(run)


if __name__ == "__main__":
    main()
