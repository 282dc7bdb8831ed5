"""What a run prints before its first step, so that a reader can audit it, and after its last."""

import os
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
from rich.console import Console

from gemma2_jax.cluster import devices, hosts, platforms
from gemma2_jax.config import Config, DataConfig
from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.data import mixtures, sources
from gemma2_jax.data.batches import Batches, EvalBatches, describe_repeated, find_shared
from gemma2_jax.data.store import Store
from gemma2_jax.mesh import describe_mesh
from gemma2_jax.training import optim, profile_tables
from gemma2_jax.training.progress import print_block
from gemma2_jax.training.samples import Prompts
from gemma2_jax.training.step import Program, parameter_group
from gemma2_jax.training.tokenizer import describe_vocabulary

_PROMPT_WIDTH = 60  # characters of the suggested prompt, at most


@dataclass(frozen=True, kw_only=True)
class Startup:
    """What is known of a run before its first step."""

    program: Program
    source: Checkpoint | None  # the weights given; None: random ones
    batches: Batches
    example: str  # a document of the training data, with its learned tokens marked
    eval_batches: EvalBatches | None  # None: no evaluation
    prompts: Prompts | None  # of samples; None: none are made
    train_step: jax.stages.Compiled
    memory_limit: devices.MemoryLimit | None  # with which the step was compared; None: it is not known
    compile_seconds: float  # of all steps
    start_step: int  # steps that the run has already taken
    changes: list[str]  # how the config differs from what it was when the run was last started
    checkpoint: str  # from which the run goes on, and how whole it is: `Checkpoints.opened`
    shortage: str  # of room for a checkpoint: `Checkpoints.describe_shortage`


def print_startup(console: Console, startup: Startup) -> None:
    """Prints one line for each subject. Process 0 does it for all of them."""
    if jax.process_index() == 0:
        print_block(console, [*_describe_weights(startup), *_describe_work(startup), *_describe_execution(startup)])


def _describe_weights(startup: Startup) -> Iterator[tuple[str, str]]:
    program, source, start_step = startup.program, startup.source, startup.start_step
    config = program.config
    origin = f"{source.format} {source.path}" if source else f"random (train.seed {config.train.seed})"
    start = f"resumes after step {start_step}" if start_step else "starts"
    yield "run", f"{config.output}, {start}, to step {config.steps}"
    if startup.checkpoint:
        yield "checkpoint", startup.checkpoint
    yield "weights", config.init if config.init_adapter else origin
    if config.init_adapter:
        yield "adapter", f"{'started' if start_step else 'starts'} from {origin}"
    for note in source.notes if source else ():
        yield "note", note
    if growth := describe_vocabulary(program, source):
        yield "vocabulary", growth
    yield "parameters", describe_parameters(program)
    frozen = f", {config.compute.frozen_dtype} frozen" if program.frozen else ""
    yield "precision", f"{config.compute.dtype} compute, {config.compute.trained_dtype} trained{frozen}"


def _describe_work(startup: Startup) -> Iterator[tuple[str, str]]:
    program = startup.program
    config, train = program.config, program.config.train
    shards = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    passes = train.global_batch_size // (train.micro_batch_size * shards)
    kinds = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    place = hosts.find_place(config.hosts, os.environ)
    yield "devices", f"{kinds}, {place}; mesh {describe_mesh(program.mesh)}"
    yield (
        "step",
        f"{train.global_batch_size} rows x {train.sequence_length} tokens = "
        f"{train.global_batch_size * train.sequence_length:,} tokens, in {passes} pass(es) of {train.micro_batch_size} "
        f"rows x {shards} shard(s)",
    )
    products = "backward by inputs" if program.frozen else "backward by inputs and by weights"
    yield (
        "model FLOPs",
        f"{config.training_flops / 1e9:.3g} GFLOP a token (forward, {products}; attention causal and windowed, as if "
        f"unpacked){describe_peak(program.device.device_kind)}",
    )
    if program.mesh.shape["stage"] > 1:
        yield "pipeline", describe_pipeline(program)
    yield "optimizer", describe_optimizer(config)
    yield "training data", f"{config.data.train}: {startup.batches.summary}"
    for name, text in startup.batches.describe_sources(config.steps).items():
        yield f"  {name}", text
    stores = _label_stores(program, "train", startup.batches.stores)
    for label, store in stores:
        if store.report.documents:  # .bin and .idx files have no report
            longest = store.report.describe_longest(train.sequence_length)
            yield "documents", f"{label}{_list_shapes(store)}; {longest}"
    for label, store in stores:
        for sentence in store.report.describe():
            yield "note", f"{label}{sentence}"
    if repeated := describe_repeated(config.data):
        yield "note", repeated
    if startup.example:
        yield "example", startup.example
    yield "held-out data", describe_eval(config, startup.eval_batches)
    if startup.eval_batches is not None:
        said = {sentence for _, store in stores for sentence in store.report.describe()}
        yield from (("note", note) for note in _note_held_out(program, startup.eval_batches, said))
    if startup.prompts:
        yield "samples", startup.prompts.describe(config.sample.tokens)
    elif config.sample.prompts:
        yield "samples", "none are made of sample.prompts, as sample.tokens is 0"


def _note_held_out(program: Program, batches: EvalBatches, said: set[str]) -> Iterator[str]:
    """Sentences on held-out documents, less what was said of the training data: a share that is held out is of it."""
    for label, store in _label_stores(program, "eval", batches.stores):
        for sentence in store.report.describe():
            if sentence not in said:
                yield f"held-out data: {label}{sentence}"
    if shared := find_shared(program.config.data):
        count = f"{len(shared):,} files, such as {shared[0]}" if len(shared) > 1 else shared[0]
        yield f"data.train and data.eval both have {count}; a held-out loss of what is trained on tells little"


def _label_stores(program: Program, split: sources.Split, stores: list[Store]) -> list[tuple[str, Store]]:
    """Each store with the name of its source, to be put before what is said of it; without, where there is one."""
    names = program.sources[split]
    labels = [f"{name}: " for name in names] if len(names) > 1 else [""]
    return list(zip(labels, stores, strict=False))  # Megatron's order has no stores


def _list_shapes(store: Store) -> str:
    return ", ".join(f"{count:,} {shape}" for shape, count in store.report.shapes.most_common())


def _describe_execution(startup: Startup) -> Iterator[tuple[str, str]]:
    program = startup.program
    config = program.config
    yield "attention", program.attention_reason
    limit = f", of {startup.memory_limit.size / 2**20:,.0f} MiB" if startup.memory_limit else ""
    yield "memory", f"{describe_memory(startup.train_step)}{limit}; compiled in {startup.compile_seconds:.1f} s"
    yield "compiled programs", platforms.describe_cache()
    if program.device.platform == "gpu":
        flags = " ".join(f"{name}={value}" for name, value in program.compiler_options.items()) or "XLA's defaults"
        process = f"{platforms.describe_memory_fraction()}, {platforms.describe_collective_timeout()}"
        yield "GPU flags", f"{flags} (compute.gpu_flags); {process}"
    if os.environ.get("WANDB_API_KEY") and not config.train.wandb:
        yield "W&B", "not used, though WANDB_API_KEY is set; --train.wandb PROJECT sends the metrics there as well"
    if startup.shortage:
        yield "disk", f"too small: a checkpoint {startup.shortage}; make room before the next is due"
    if startup.changes:
        yield "changed", "; ".join(startup.changes)


def describe_optimizer(config: Config) -> str:
    """The optimizer in a line, with its warmup, which a short run cuts."""
    settings = config.optim
    warmup = optim.warmup_length(settings, config.steps)
    cut = ""
    if warmup < settings.warmup_steps:
        last = settings.decay_steps or config.steps
        cut = f" ({settings.warmup_steps} were asked, but the decay ends with step {last})"
    return (
        f"AdamW, lr {settings.lr:g} -> {settings.min_lr:g} cosine after {warmup} warmup steps{cut}, decay "
        f"{settings.weight_decay:g}, clip {settings.clip_norm:g}"
    )


def describe_eval(config: Config, eval_batches: EvalBatches | None) -> str:
    """The held-out data, or why nothing is evaluated."""
    if eval_batches is not None:
        return f"{config.data.eval or config.data.train}: {eval_batches.summary}"
    if not config.data.has_eval:
        if config.data.split_shares:
            return f"none, and no evaluation (data.split_shares {config.data.split_shares} holds out nothing)"
        return "none, and no evaluation (data.eval is empty, and data.eval_fraction is 0)"
    share = config.data.eval or f"{config.data.eval_fraction:.3g} of {config.data.train}, which is not trained on"
    return f"{share}; no evaluation (train.eval_every is 0)"


def describe_pipeline(program: Program) -> str:
    """How layers and passes are distributed over stages, and the share of a step that a stage spends waiting."""
    stages = program.pipeline
    layers = [int(stages.stage_layers(stage)) for stage in range(stages.stages)]
    vocabulary = program.config.model.vocab_size
    repeated = f"; all make all logits, as they do not divide {vocabulary:,}" if vocabulary % stages.stages else ""
    return (
        f"{stages.stages} stages of {' + '.join(map(str, layers))} layers; {stages.passes} passes, of which at most "
        f"{stages.slots} are live; bubble {stages.bubble:.1%} = (stages - 1) / (passes + stages - 1){repeated}"
    )


def print_nothing_to_do(console: Console, config: Config, step: int, early_end: str = "") -> None:
    """Says that the run has already taken its steps, or why it has ended before."""
    if jax.process_index() == 0:
        reason = f"this run has already taken {step} steps, of {config.steps} asked"
        remedy = "" if step > config.steps else "; to go on, give more --steps"
        console.print(
            f"there is nothing to do: {early_end or reason + remedy}", highlight=False, markup=False, soft_wrap=True
        )


def print_ending(
    console: Console, config: Config, step: int, trace_folder: Path | None = None, best: Path | None = None
) -> None:
    """Says where the result of the last step is, what else was written, and what one would do with it next."""
    if jax.process_index() != 0:
        return
    product, form = ("weights", "hf") if config.adapter.kind == "none" else ("adapter", "peft")
    if config.adapter.unmergeable_targets:
        form = "orbax"  # PEFT would add it elsewhere
    workdir = shlex.quote(str(config.output))
    exported = shlex.quote(f"{config.output}-{form}")
    lines = [f"\nThe {product} of step {step}: {config.output}/checkpoints/{step}/params"]
    if config.train.export_adapter:
        lines.append(f"For PEFT:  {config.output}/adapters/{step}")
    if best is not None:
        lines.append(f"Best:      {best} ({config.train.export_best}, of step {best.name})")
    if trace_folder is not None:
        lines.append(f"Trace:     {trace_folder.parents[2]} (XProf and TensorBoard open it)")
    elif config.profile.steps:
        lines.append(f"Trace:     none, as the run ended before profile.start {config.profile.start}")
    lines += [
        f"Generate:  python -m gemma2_jax.generate --checkpoint {workdir} {suggest_prompt(config.data)}",
        f"Export:    python -m gemma2_jax.convert {workdir} {exported} --to {form}",
    ]
    if trace_folder is not None:
        print_profile(console, trace_folder)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_profile(console: Console, trace_folder: Path) -> None:
    """Prints the tables of a trace, or why there are none, which takes nothing from the run."""
    try:
        profile_tables.print_tables(profile_tables.read_profile(trace_folder))
    except (ValueError, OSError) as error:
        text = f"\nThe trace has no tables: {error}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def suggest_prompt(data: DataConfig) -> str:
    """Options of `generate` with a prompt like those of the data: its first one, held-out if there is any."""
    if data.train == sources.PYTHON_DOCS and not data.eval:  # reading it takes seconds
        return '--chat --prompt "What does json.dumps do?"' if data.kind == "instructions" else '--prompt "The"'
    split = "eval" if data.has_eval else "train"
    try:
        example = next(sources.read_examples(mixtures.list_sources(data, split)[0].data, split))
    except (ValueError, OSError, StopIteration):
        return "--prompt TEXT"  # the data has moved since it was tokenized
    if example.turns:
        text = next((turn.content for turn in example.turns if turn.role == "user"), "")
        return f"--chat --prompt {shlex.quote(_shorten(text))}"
    return f"--prompt {shlex.quote(_shorten(example.prompt or example.completion))}"


def _shorten(text: str) -> str:
    """The beginning of a text's first line, cut at the end of a word."""
    line = text.strip().partition("\n")[0].strip()
    if len(line) <= _PROMPT_WIDTH:
        return line
    words = line[: _PROMPT_WIDTH + 1].rpartition(" ")[0].rstrip()
    return words or line[:_PROMPT_WIDTH]


def describe_parameters(program: Program) -> str:
    """Parameters by group, and the share that is trained."""
    groups: Counter[str] = Counter()
    for path, leaf in {**program.params, **program.frozen}.items():
        groups[parameter_group(path)] += leaf.size
    trained, total = sum(leaf.size for leaf in program.params.values()), groups.total()
    parts = " + ".join(f"{name} {size:,}" for name, size in groups.items())
    return f"{parts} = {total:,}; trained {trained:,} ({trained / total:.2%})"


def describe_peak(device_kind: str) -> str:
    """What MFU is measured by, to follow other text; empty for a CPU, of which nobody asks."""
    if device_kind == "cpu":
        return ""
    if peak := devices.peak_flops(device_kind):
        return f"; MFU is by {peak / 1e12:g} TFLOP/s a device, its peak in dense bfloat16"
    return f"; no MFU, as the peak of {device_kind} is not in PEAKS of gemma2_jax/cluster/devices.py"


def describe_memory(compiled: jax.stages.Compiled) -> str:
    """Memory of the compiled step on each device."""
    stats = compiled.memory_analysis()
    if stats is None:
        return "not known"
    arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    return f"{arguments / 2**20:,.0f} MiB state and batch + {temporaries / 2**20:,.0f} MiB temporaries a device"
