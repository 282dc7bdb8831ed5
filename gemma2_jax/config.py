"""Every choice of a run as frozen dataclasses: the model, the recipe, and nothing that needs JAX.

A recipe (`configs/NAME.py`) is a function `config()` that returns a `Config`; `load_recipe` finds it by name or path.
Nothing here says how a choice is carried out. This module imports the standard library only, so that a command
line can answer `--help` before JAX is loaded.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gemma2_jax.model_config import AdapterConfig, DType, ModelConfig

# What a block computes that takes matrix products, by the names that `checkpoint_name` gives it in the model. That of
# attention is its output and log-sum-exp, which its backward pass takes.
KeptOutput = Literal["q", "k", "v", "attention", "o", "gate", "up", "down"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and how it becomes rows of tokens."""

    kind: Literal["text", "instructions"] = "instructions"  # loss on every token, or on completions only
    # Built-in python-docs; files of JSON, CSV, text, Parquet or Arrow: one, a folder, a glob or a URL; a Hub data set.
    train: str = "python-docs"  # or several: a,b or, with weights, 0.7*a,0.3*b
    eval: str = ""  # held-out data, likewise; empty: train's split for it, or else a share, chosen by hash
    eval_fraction: float = 0.02  # share of the documents, at least one, held out where no split is; 0: nothing is
    subset: str = ""  # of a data set of the Hub that has several, such as main of openai/gsm8k
    split: str = "train"  # that is trained on, of folders and of data sets of the Hub: train, validation, train_sft...
    tokenizer: str = ""  # a directory or hub id; empty: the one beside the initial weights
    columns: str = ""  # what its columns hold, where their names do not tell: prompt=q,completion=a or text=body
    prompt_template: str = ""  # such as "Context: {context} Question: {question} Answer:", instead of a prompt
    # Of consecutive turns of one role, where the chat template does not take them: an error, or one turn.
    repeated_roles: Literal["refuse", "merge"] = "refuse"
    # At documents that cannot be trained on: stop with the first, or leave them out and count them.
    on_bad: Literal["stop", "skip"] = "stop"
    packing: bool = True  # several documents share a row, and attend only to themselves
    # Of rows: documents shuffled and packed, or as Megatron-LM reads its .bin and .idx files, sample for sample.
    order: Literal["shuffled", "megatron"] = "shuffled"
    split_shares: str = ""  # of .bin and .idx files: documents trained on, held out, left: 9999,8,2; else eval_fraction
    stream: bool = False  # one source read while it is trained on, in its own order, instead of tokenized before
    seed: int = 1234  # of the order of documents
    cache: str = ""  # folder of tokenized data, shared by runs; empty: in SAVE_DIR, else in ~/.cache/gemma2_jax

    def __post_init__(self) -> None:
        for name in ("train", "eval"):
            object.__setattr__(self, name, join_sources(f"data.{name}", getattr(self, name)))
        if not self.train.strip():
            raise ValueError("data.train is empty; name what is trained on ('.' is the current folder)")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"data.eval_fraction is {self.eval_fraction}; it must be at least 0 and below 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"data.seed is {self.seed}; it must be at least 0 and below 2**32")
        if not re.fullmatch(r"\w+([.-]\w+)*", self.split):
            raise ValueError(
                f"data.split is {self.split!r}; it must be the name of a split, such as train or validation; to train "
                "on a part of one, give fewer steps, or data.split_shares where it is of .bin and .idx files"
            )
        if self.columns and not re.fullmatch(r"\w+=[^=,]+(,\w+=[^=,]+)*", self.columns):
            raise ValueError(f"data.columns is {self.columns!r}; it must be like prompt=question,completion=answer")
        if self.split_shares and self.eval:
            raise ValueError(
                f"data.split_shares {self.split_shares} and data.eval {self.eval} both say what is held out; give one"
            )
        if self.stream and (self.order == "megatron" or self.split_shares):
            name = "data.split_shares" if self.split_shares else "data.order megatron"
            raise ValueError(
                f"data.stream tokenizes documents as it reads them, and {name} is for .bin and .idx files, which hold "
                "tokens already; leave out data.stream"
            )
        number = r"\d+(\.\d+)?"
        if self.split_shares and (
            not re.fullmatch(f"{number}(,{number}){{1,2}}", self.split_shares) or not self.shares[0]
        ):
            raise ValueError(
                f"data.split_shares is {self.split_shares!r}; it must be like 9999,8,2: trained on, held out and left, "
                "of which the last may be missing"
            )

    @property
    def column_names(self) -> dict[str, str]:
        """`columns` by what they hold: {"prompt": "question"}."""
        return dict(pair.split("=") for pair in self.columns.split(",")) if self.columns else {}

    @property
    def shares(self) -> tuple[float, ...]:
        """How much of an indexed data set is trained on, held out and neither; they need not add up to 1."""
        if self.eval:
            return 1.0, 0.0, 0.0
        if not self.split_shares:
            return 1 - self.eval_fraction, self.eval_fraction, 0.0
        given = tuple(map(float, self.split_shares.split(",")))
        return given + (0.0,) * (3 - len(given))

    @property
    def has_eval(self) -> bool:
        """Whether there are held-out documents."""
        return bool(self.eval) or self.shares[1] > 0


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (arXiv:1711.05101) with linear warmup and cosine decay."""

    lr: float  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end of the decay
    warmup_steps: int = 10  # steps from 0 to the peak
    decay_steps: int | None = None  # step at which min_lr is reached; None: the run's last
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.033  # decoupled, on matrices only: norms and DoRA magnitudes are exempt
    clip_norm: float = 1.0  # largest global norm of the gradient

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must be positive and finite")
        for name in ("min_lr", "warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must not be negative, nor infinite")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"optim.decay_steps is {self.decay_steps}; use 1 or more, or None for the last step")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Sizes and rhythm of the training loop."""

    sequence_length: int = 2048  # tokens in a row
    global_batch_size: int = 128  # rows per optimizer step, over all devices
    micro_batch_size: int = 1  # rows per forward pass on each of the data x fsdp shards
    seed: int = 5678  # of initial weights, adapters and dropout
    log_every: int = 1  # steps between lines of metrics.jsonl
    eval_every: int = 50  # steps between evaluations; one precedes the first step, one follows the last; 0: none
    eval_batches: int = 10  # batches of an evaluation, at most
    checkpoint_every: int = 100  # steps between checkpoints; one more follows the last step
    keep_checkpoints: int = 2  # newest checkpoints kept
    keep_every: int = 0  # checkpoints of steps that this divides are kept for good; 0: none are
    keep_best: int = 0  # checkpoints of the lowest held-out losses kept, beside the newest
    patience: int = 0  # evaluations without a lower held-out loss, after which the run ends; 0: it goes on
    export_best: Literal["", "hf", "peft", "orbax"] = ""  # format to write the best checkpoint in at the end of the run
    # Where checkpoints are copied to as well: s3://BUCKET/RUN, hf://ORG/NAME or a folder; empty: nowhere.
    upload: str = ""
    save_deadline: int = 3600  # seconds that writing a checkpoint may take, after which the run ends
    stop_after: str = ""  # time since the command was started, as 3h50m, after which it saves and ends; empty: none
    export_adapter: bool = False  # with each checkpoint, write its adapter for PEFT too, as WORKDIR/adapters/STEP
    tensorboard: bool = False  # metrics go to TensorBoard as well, in WORKDIR/tensorboard
    wandb: str = ""  # Weights & Biases project that metrics go to as well; empty: none
    mlflow: str = ""  # MLflow experiment that metrics go to as well, where MLFLOW_TRACKING_URI says; empty: none

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            lowest = 0 if f.name in ("eval_every", "keep_every", "keep_best", "patience") else 1
            if f.type is int and f.name != "seed" and not lowest <= (value := getattr(self, f.name)) < 2**31:
                raise ValueError(f"train.{f.name} is {value}; it must be at least {lowest} and below 2**31")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"train.seed is {self.seed}; it must be at least 0 and below 2**32")
        if self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"train.keep_every is {self.keep_every}, and a checkpoint is written every {self.checkpoint_every} "
                "steps; give a multiple of train.checkpoint_every"
            )
        if self.keep_best and self.eval_every and self.checkpoint_every % self.eval_every:
            raise ValueError(
                f"train.keep_best is {self.keep_best}, and of the checkpoints every {self.checkpoint_every} steps some "
                f"have no held-out loss, as one is computed every {self.eval_every}; make train.checkpoint_every a "
                "multiple of train.eval_every"
            )
        if self.export_best and not self.keep_best:
            raise ValueError(
                f"train.export_best is {self.export_best}, but train.keep_best is 0, which keeps the newest "
                "checkpoints alone; set train.keep_best to 1"
            )
        if not read_duration(self.stop_after):
            raise ValueError(f"train.stop_after is {self.stop_after!r}; it must be a time such as 3h50m, 90m or 45s")


def read_duration(text: str) -> float:
    """Seconds of a time such as 3h50m, 90m or 45s; infinite for an empty text, and 0 for what is no time."""
    if not text:
        return math.inf
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    units = (86_400, 3_600, 60, 1)
    return sum(int(count or 0) * unit for count, unit in zip(parts.groups(), units, strict=True)) if parts else 0.0


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Precision, kernels and memory."""

    dtype: DType = "bfloat16"  # of activations and matrix products (which accumulate in float32)
    trained_dtype: DType = "float32"  # of weights that are trained, and of their optimizer state
    frozen_dtype: DType = "bfloat16"  # of weights that are not
    # Of attention: fused kernels for Hopper, jnp, or the first of these that can.
    attention: Literal["auto", "mosaic", "xla"] = "auto"
    tune_kernels: bool = False  # have the kernels' tiles timed at the start, on a kind of device where they never were
    # Of a block, kept for the backward pass: everything, matrix products, its input, its input in the host's memory.
    remat: Literal["none", "dots", "block", "offload"] = "block"
    # Of a block, kept beside its input: outputs of these products, and attention's; the others are recomputed.
    kept_outputs: tuple[KeptOutput, ...] = ()
    # XLA's on GPU: its defaults, or more communication beside compute.
    gpu_flags: Literal["none", "overlap"] = "none"
    loss_chunk: int = 1024  # positions of a row whose logits exist at one time

    def __post_init__(self) -> None:
        if self.loss_chunk < 1:
            raise ValueError(f"compute.loss_chunk is {self.loss_chunk}; it must be at least 1")
        if self.kept_outputs and self.remat in ("none", "dots"):
            raise ValueError(
                f"compute.kept_outputs names {' and '.join(self.kept_outputs)}, and compute.remat is {self.remat}, "
                "which keeps the outputs of all products; use compute.remat block, or leave out compute.kept_outputs"
            )


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; one of them may be -1, for all the devices that are left."""

    data: int = -1  # copies of the model, each with its rows of the batch
    stage: int = 1  # pipeline stages, each with its run of layers
    fsdp: int = 1  # shards of weights and optimizer state, gathered layer by layer; also splits the batch
    context: int = 1  # shards of a row's positions, everywhere; also splits weights and optimizer state as fsdp does
    tensor: int = 1  # shards of heads, MLP width and vocabulary, and of positions between blocks

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        described = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        if any(size < 1 and size != -1 for size in sizes.values()) or [*sizes.values()].count(-1) > 1:
            raise ValueError(f"mesh {described}: every axis must be at least 1, and at most one may be -1 (the rest)")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Steps that go wrong. One whose loss or gradient is not finite is skipped: it changes no weight and no moment."""

    skip_limit: int = 10  # steps in a row that may be skipped; the run ends with one more, and keeps its weights
    skip_deviations: float = 0.0  # a gradient norm this many standard deviations above the mean is skipped too; 0: none
    spike_deviations: float = 6.0  # a loss this many standard deviations above the mean is warned of; 0: none
    stuck_seconds: float = 600.0  # a step, batch or save may take that long, or 5 times the longest so far; 0: any time

    def __post_init__(self) -> None:
        for name in ("skip_limit", "skip_deviations", "spike_deviations", "stuck_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"guard.{name} is {getattr(self, name)}; it must not be negative, nor infinite")
        if 0 < self.stuck_seconds < 1:
            raise ValueError(
                f"guard.stuck_seconds is {self.stuck_seconds}; the run is looked at once a second, so give at least 1, "
                "or 0 to let everything take any time"
            )


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What the model says to fixed prompts, logged with each evaluation; each token is the most likely one."""

    prompts: tuple[str, ...] = ()  # questions where the data is conversations, else beginnings of texts
    tokens: int = 0  # new tokens for each prompt, at most; 0: no samples are made

    def __post_init__(self) -> None:
        if not 0 <= self.tokens < 2**31:
            raise ValueError(f"sample.tokens is {self.tokens}; it must be at least 0 and below 2**31")
        if self.tokens and not self.prompts:
            raise ValueError(
                f"sample.tokens is {self.tokens}, and sample.prompts is empty; give --sample.prompts 'What is AI?', or "
                "leave sample.tokens 0"
            )


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """An XLA trace for XProf or TensorBoard, under WORKDIR/profile, and tables of it; the compiled step."""

    start: int = 0  # first step traced, counted from this process's first step
    steps: int = 0  # steps traced; 0: none, and 3 where a trace is asked for (SIGUSR2, WORKDIR/profile.request)
    keep_program: bool = False  # write the compiled step to WORKDIR/program: its HLO and its executable

    def __post_init__(self) -> None:
        if self.start < 0 or self.steps < 0:
            raise ValueError(f"profile.start {self.start} and profile.steps {self.steps} must not be negative")


@dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """The processes of one run. What is left empty is found from SLURM, Open MPI, Kubernetes or JAX's variables."""

    coordinator: str = ""  # host:port where the processes meet; the host is that of process 0
    count: int = 0  # processes, of which each host runs at least one; 0: found, else 1
    index: int = -1  # which of them this one is, from 0; -1: found

    def __post_init__(self) -> None:
        if self.coordinator and not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(f"hosts.coordinator is {self.coordinator!r}; it must be host:port, such as node-1:5555")
        if self.count < 0 or self.index < -1:
            raise ValueError(f"hosts.count {self.count} and hosts.index {self.index} must not be negative")
        if self.count and self.index >= self.count:
            raise ValueError(
                f"hosts.index {self.index} of hosts.count {self.count}: processes count from 0; "
                f"use 0 to {self.count - 1}"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run. `python -m gemma2_jax.train --config NAME` carries it out."""

    model: ModelConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)
    init: str = ""  # weights to start from: a Hugging Face directory or hub id, or an Orbax checkpoint; empty: random
    init_adapter: str = ""  # adapter on init to go on training (or --adapter): PEFT, Orbax or a run; empty: a new one
    workdir: str  # where everything the run writes goes
    steps: int = 100  # optimizer steps

    def __post_init__(self) -> None:
        if not 1 <= self.steps < 2**31:  # steps are counted in int32
            raise ValueError(f"steps is {self.steps}; it must be at least 1 and below 2**31")
        if not self.workdir:
            raise ValueError("workdir is empty; name the folder to write to ('.' is the current one)")
        if self.train.sequence_length > self.model.max_length:
            raise ValueError(
                f"train.sequence_length {self.train.sequence_length} is beyond the model's context of "
                f"{self.model.max_length}; shorten it, or raise model.max_length if that is meant"
            )
        model, ranks = self.model, [self.adapter.rank, *(rank for _, rank in self.adapter.rank_pattern)]
        widest = max(model.width, model.mlp_width, model.heads * model.head_width)
        if self.adapter.kind != "none" and max(ranks) > widest:
            raise ValueError(f"adapter.rank is {max(ranks)}, and no weight of the model is wider than {widest}")
        if self.init_adapter and not self.init:
            raise ValueError(f"init_adapter is {self.init_adapter}, and init is empty; set init to the model it is for")
        if self.sample.tokens and not self.train.eval_every:
            raise ValueError(
                f"sample.tokens is {self.sample.tokens}, and train.eval_every is 0, with which none are made; "
                "give train.eval_every, or leave sample.tokens 0"
            )
        if self.train.export_adapter and not (self.init and self.adapter.kind != "none"):
            raise ValueError(
                f"train.export_adapter is True, but adapter.kind is {self.adapter.kind} and init is {self.init!r}; it "
                "takes adapter.kind lora or dora, on a model that init names"
            )
        self._check_best()

    def _check_best(self) -> None:
        """Raises ValueError where the best held-out loss is asked for and cannot be had, or cannot be exported."""
        train = self.train
        if not (self.data.has_eval and train.eval_every):
            for name in ("keep_best", "patience"):
                if getattr(train, name):
                    raise ValueError(
                        f"train.{name} is {getattr(train, name)}, but there is no held-out loss: set train.eval_every, "
                        "and data.eval or data.eval_fraction"
                    )
        if not train.export_best:
            return
        has_adapter = self.adapter.kind != "none"
        if has_adapter and not self.init:
            raise ValueError(
                f"train.export_best is {train.export_best}, but init is empty, and an adapter on random weights is of "
                "no use elsewhere; set init, or leave out train.export_best"
            )
        if train.export_best == "peft" and not has_adapter:
            raise ValueError("train.export_best is peft, but adapter.kind is none; export it as hf or orbax")
        if train.export_best != "orbax" and self.adapter.unmergeable_targets:
            raise ValueError(
                f"train.export_best is {train.export_best}, and no other program adds the adapter of "
                f"{' and '.join(self.adapter.unmergeable_targets)} after the post-norm; export it as orbax"
            )

    @property
    def training_flops(self) -> float:
        """FLOPs of training on one token: the forward pass, and as much again for each backward product.

        A product has two backward products, one by each factor; that of a frozen weight has only the one by its inputs.
        Adapters' own products, some percent of the model's, and those by weights in `modules_to_save` are not counted;
        nor is recomputed work. `ModelConfig.forward_flops` says what is.
        """
        length = self.train.sequence_length
        forward, attention = self.model.forward_flops(length), self.model.attention_flops(length)
        backward = 2 * forward if self.adapter.kind == "none" else forward + attention
        return forward + backward

    @property
    def output(self) -> Path:
        """The working directory."""
        return Path(self.workdir)


def join_sources(field: str, value: str | Sequence[str]) -> str:
    """The text of sources that may be given as a list. Raises ValueError where a comma is part of one's name."""
    if isinstance(value, str):
        return value
    for source in value:
        if "," in source:
            raise ValueError(f"{field} lists {source!r}, and commas separate sources; write ? in place of its comma")
    return ",".join(value)
