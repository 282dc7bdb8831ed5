"""What a run prints before its first step, so that a reader can audit it, and after its last."""

import os
import shlex
from collections import Counter

import jax
from rich.console import Console
from rich.table import Table

from gemma2_jax.cluster import hosts, platforms
from gemma2_jax.config import Config
from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.data.batches import Batches, EvalBatches
from gemma2_jax.mesh import describe_mesh
from gemma2_jax.training.step import Program


def print_startup(
    console: Console,
    program: Program,
    source: Checkpoint | None,
    batches: Batches,
    held_out: EvalBatches,
    compiled: jax.stages.Compiled,
    seconds: float,
    first: int,
    changes: list[str],
) -> None:
    """Prints the block.

    `compiled` is the compiled step, which took `seconds`; `first` is the step the run goes on from, and `changes` says
    how its config differs from what it was before.
    """
    if jax.process_index() != 0:
        return
    config = program.config
    train, optim, mesh = config.train, config.optim, program.mesh
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows_per_pass = train.micro_batch_size * shards
    tokens = train.global_batch_size * train.sequence_length
    resumed = f"resumes after step {first}" if first else "starts"
    given = f"{source.format} {source.path}" if source else f"random (train.seed {train.seed})"
    adapter = {"adapter": f"{'started' if first else 'starts'} from {given}"} if config.init_adapter else {}
    device = jax.devices()[0]
    lines = {
        "run": f"{config.output}, {resumed}, to step {config.steps}",
        "weights": config.init if adapter else given,
        **adapter,
        "parameters": describe_parameters(program),
        "precision": f"{config.compute.dtype} compute, {config.compute.trained_dtype} trained"
        + (f", {config.compute.frozen_dtype} frozen" if program.frozen else ""),
        "devices": f"{jax.device_count()} x {device.device_kind}, {hosts.find_place(config.hosts, os.environ)}; mesh "
        f"{describe_mesh(mesh)}",
        "step": f"{train.global_batch_size} rows x {train.sequence_length} tokens = {tokens:,} tokens, in "
        f"{train.global_batch_size // rows_per_pass} pass(es) of {train.micro_batch_size} rows x {shards} shard(s)",
        "model FLOPs": f"{config.training_flops / 1e9:.3g} GFLOP a token (forward, backward by inputs"
        f"{'' if program.frozen else ' and by weights'}; attention causal and windowed, as if unpacked)",
        **({"pipeline": describe_pipeline(program)} if mesh.shape["stage"] > 1 else {}),
        "optimizer": f"AdamW, lr {optim.lr:g} -> {optim.min_lr:g} cosine after {optim.warmup_steps} warmup steps, "
        f"decay {optim.weight_decay:g}, clip {optim.clip_norm:g}",
        "training data": f"{config.data.train}: {batches.summary}",
        "held-out data": f"{config.data.eval or config.data.train}: {held_out.summary}",
        "attention": program.attention_reason,
        "memory": describe_memory(compiled) + f"; compiled in {seconds:.1f} s",
        "compiled programs": platforms.describe_cache(),
    }
    if program.device.platform == "gpu":
        flags = " ".join(f"{name}={value}" for name, value in program.compiler_options.items()) or "XLA's defaults"
        lines["GPU flags"] = f"{flags} (compute.gpu_flags); {platforms.describe_memory_fraction()}"
    if os.environ.get("WANDB_API_KEY") and not train.wandb:
        lines["W&B"] = "not used, though WANDB_API_KEY is set; --train.wandb PROJECT sends the metrics there as well"
    if changes:
        lines["changed"] = "; ".join(changes)
    grid = Table.grid(padding=(0, 2))
    for name, text in lines.items():
        grid.add_row(f"[bold]{name}[/bold]", text)
    console.print(grid, highlight=False)


def describe_pipeline(program: Program) -> str:
    """How layers and passes are dealt out over stages, and the share of a step that stages wait for each other."""
    stages = program.pipeline
    layers = [int(stages.stage_layers(stage)) for stage in range(stages.stages)]
    vocabulary = program.config.model.vocab_size
    twice = f"; all make all logits, as they do not divide {vocabulary:,}" if vocabulary % stages.stages else ""
    return (
        f"{stages.stages} stages of {' + '.join(map(str, layers))} layers; {stages.passes} passes, of which at most "
        f"{stages.slots} are live; bubble {stages.bubble:.1%} = (stages - 1) / (passes + stages - 1){twice}"
    )


def print_ending(console: Console, config: Config) -> None:
    """Says where the result is, and what one would do with it next."""
    if jax.process_index() != 0:
        return
    what, form = ("weights", "hf") if config.adapter.kind == "none" else ("adapter", "peft")
    if config.adapter.unmergeable_targets:
        form = "orbax"  # PEFT would add it elsewhere
    chat = '--chat --prompt "What does json.dumps do?"' if config.data.kind == "instructions" else '--prompt "The"'
    workdir = shlex.quote(str(config.output))
    exported = shlex.quote(f"{config.output}-{form}")
    for line in (
        f"\nThe {what} of step {config.steps}: {config.output}/checkpoints/{config.steps}/params",
        f"Generate:  python -m gemma2_jax.generate --checkpoint {workdir} {chat}",
        f"Export:    python -m gemma2_jax.convert {workdir} {exported} --to {form}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def describe_parameters(program: Program) -> str:
    """Parameters by group, and the share that is trained."""
    groups: Counter[str] = Counter()
    for path, leaf in {**program.params, **program.frozen}.items():
        groups[parameter_group(path)] += leaf.size
    trained, total = sum(leaf.size for leaf in program.params.values()), groups.total()
    parts = " + ".join(f"{name} {size:,}" for name, size in groups.items())
    return f"{parts} = {total:,}; trained {trained:,} ({trained / total:.2%})"


def describe_memory(compiled) -> str:
    """Memory of the compiled step on each device."""
    stats = compiled.memory_analysis()
    kept, temporary = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    return f"{kept / 2**20:,.0f} MiB state and batch + {temporary / 2**20:,.0f} MiB temporaries a device"


def parameter_group(path: str) -> str:
    if "/adapter/" in path:
        return "adapters"
    if path.endswith("norm/w"):
        return "norms"
    return path.split("/")[1] if path.startswith("blocks/") else path
