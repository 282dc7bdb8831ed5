"""The front door: what a script or a notebook needs, in few verbs. `import gemma2_jax as g2` gives them as `g2.load`.

Every function is thin: `inference`, `convert`, `training` and `planning` do the work. Each calls `prepare_process`
first, which sets what JAX needs before it starts.
"""

import dataclasses
import difflib
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from gemma2_jax import config as configs, config_text, recipes
from gemma2_jax.cluster import platforms
from gemma2_jax.config import Config, MeshConfig
from gemma2_jax.model_config import DType, FileDType

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from gemma2_jax.convert.checkpoints import Checkpoint
    from gemma2_jax.convert.job import Format
    from gemma2_jax.inference.loaded import LoadedModel
    from gemma2_jax.model.gemma2 import Gemma2
    from gemma2_jax.planning.report import Plan
    from gemma2_jax.training.step import Program, State

logger = logging.getLogger(__name__)


def mesh(
    *, data: int = -1, stage: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1, devices: list | None = None
) -> "Mesh":
    """A mesh over `devices` (by default all of them) with axes of these sizes; one may be -1, for what is left.

    `MeshConfig` says what each axis splits. Raises ValueError where the sizes do not multiply to the devices.

    >>> mesh(tensor=2, fsdp=2).shape
    OrderedDict({'data': 2, 'stage': 1, 'fsdp': 2, 'context': 1, 'tensor': 2})
    """
    platforms.prepare_process()
    from gemma2_jax.mesh import make_mesh

    sizes = MeshConfig(data=data, stage=stage, fsdp=fsdp, context=context, tensor=tensor)
    return make_mesh(sizes, devices)


def load(
    path: str | Path,
    *,
    mesh: "Mesh | None" = None,
    adapter: str | Path | None = None,
    dtype: DType | None = None,
    hf_config: str | Path | None = None,
) -> "LoadedModel":
    """A checkpoint of any format as a Gemma2 on a mesh: `model(tokens)` gives logits, float32 [B, T, V].

    The model has its tokenizer as `model.tokenizer`. Every device reads the slices that it stores, so that no weight
    is ever whole on one of them.

    Args:
      path: a Hugging Face, Megatron or Orbax folder, a training run's folder, a GGUF file, or a Hub id.
      mesh: by default the first device alone. Of a mesh with stages, the stages become more fsdp shards.
      adapter: an adapter to put on it: a PEFT, Megatron or Orbax folder, or a run. It stays beside the weights.
      dtype: of matrix products and of the matrices in memory. None: products in float32 on CPU and bfloat16 elsewhere,
        weights as they are stored.
      hf_config: folder or Hub id with the config.json and tokenizer of a Megatron checkpoint that has none.

    Raises ValueError for what is no checkpoint of Gemma 2, or is an adapter without its model.

    >>> model = load("assets/tiny-gemma2", mesh=mesh(tensor=2))
    >>> tokens = model.tokenizer("What does json.dumps do?")["input_ids"]
    >>> model([tokens]).shape
    (1, 10, 4096)
    """
    platforms.prepare_process()
    from gemma2_jax.convert.opening import open_checkpoint
    from gemma2_jax.inference.loaded import load_model

    if dtype is not None and dtype not in get_args(DType):
        raise ValueError(f"dtype is {dtype!r}; it may be {' or '.join(get_args(DType))}, or None")
    with _arguments_named():
        checkpoint = open_checkpoint(path, hf_config=hf_config)
        if adapter is not None:
            checkpoint = open_checkpoint(adapter, base=checkpoint)
        _log_notes(checkpoint)
        return load_model(checkpoint, mesh, dtype)


def _log_notes(checkpoint: "Checkpoint") -> None:
    for note in checkpoint.notes:
        logger.warning("%s: %s", checkpoint.path, _name_arguments(note))


@contextmanager
def _arguments_named(**renamed: str) -> Iterator[None]:
    """Has a ValueError of the block name arguments of the function in place of options of a command."""
    try:
        yield
    except ValueError as error:
        if len(error.args) == 1:
            error.args = (_name_arguments(str(error), **renamed),)
        raise


# A whole command, which stays as it is, or an option with what may be its value.
_OPTION = re.compile(
    r"(?P<command>python -m [^;,)`]+)"
    r"|--(?P<name>to|dtype|adapter|drop|merge|chat|hf-config|tp|pp)\b(?: (?P<value>'[^']*'|[\w/.~][\w/.~-]*(?<!\.)))?"
)
_ARGUMENTS = {"hf-config": "hf_config", "tp": "ranks[0]", "pp": "ranks[1]", "merge": "merge=True", "chat": "chat=True"}


def _name_arguments(message: str, **renamed: str) -> str:
    """A message about options of a command, with a function's arguments in their place: --to hf is to='hf'."""

    def name_argument(match: re.Match[str]) -> str:
        option, value = match["name"], match["value"]
        if match["command"]:
            return match[0]
        name = renamed.get(option) or _ARGUMENTS.get(option, option)
        if option in ("to", "dtype", "adapter") and value:
            return f"{name}={value.strip("'")!r}"
        if option == "drop" and value and value.startswith("'"):
            return f"{name}=[{value}]"
        return name + match[0].removeprefix(f"--{option}")

    named = _OPTION.sub(name_argument, message).replace("ranks[0] and ranks[1]", "ranks").replace("as SRC", "as src")
    return re.sub(r"(merge=True) (\w+=)", r"\1, \2", named)


def generate(
    model: "LoadedModel",
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int = 0,
    stop: Collection[str] = (),
    samples: int = 1,
    chat: bool = False,
) -> list[str]:
    """The continuation of every prompt, or with `chat` the answer to it, on the model's mesh.

    A text ends after `max_new_tokens`, before any string of `stop`, or before an end token: any eos_token_id of the
    model's generation_config.json, config.json and tokenizer, and with `chat` the end of a turn. Of each prompt there
    are `samples` texts, one after another. `Sampling` says what the other settings do; at temperature 0 every token is
    the most likely one. Settings in generation_config.json are not used. While this runs, the weights are in memory a
    second time, as separate layers, with adapters merged where that is possible.

    Raises ValueError for prompts that outgrow the model's context, and without a tokenizer.

    >>> model = load("assets/tiny-gemma2")
    >>> generate(model, ["What does json.dumps do?"], max_new_tokens=8, chat=True)
    ['\\ndef json.decoder.J']
    """
    from gemma2_jax.inference.loaded import generate_texts
    from gemma2_jax.inference.settings import Sampling, TextSettings

    if isinstance(prompts, str) or not isinstance(prompts, Collection):
        raise ValueError(f"prompts is {prompts!r}; give a list of strings, such as ['What is AI?']")
    if isinstance(stop, str):
        raise ValueError(f"stop is {stop!r}; give a list of strings, such as [{stop!r}]")
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    settings = TextSettings(max_new_tokens=max_new_tokens, sampling=sampling, stop=tuple(stop), samples=samples)
    return generate_texts(model, prompts, settings, chat=chat)


def save(model: "Gemma2", path: str | Path, *, format: "Format" = "hf", merge: bool = False) -> Path:
    """Writes a model as a checkpoint, and gives its path. Weights are written bit for bit, in their own dtypes.

    The path must not exist yet; it appears whole or not at all. `merge` adds the model's adapter into the weights, in
    float32; without it an adapter is written by "peft", "megatron-adapter" and "gguf-adapter" (alone) and by "orbax"
    (with the model). "gguf" and "gguf-adapter" write one file, whose name ends in .gguf; its norms are 1 + w.

    Raises ValueError where the folder holds something, the disk has no room, or the format cannot hold the model.

    >>> save(load("assets/tiny-gemma2"), "out/tiny", format="orbax")
    PosixPath('out/tiny')
    """
    from gemma2_jax.convert.files.folder import expand_path
    from gemma2_jax.inference.loaded import save_model
    from gemma2_jax.model.gemma2 import Gemma2

    _check_format(format)
    _check_path(path, "path")
    if not isinstance(model, Gemma2):
        raise ValueError(f"model is {model!r}; give what load gives, or a Gemma2")
    target = expand_path(path)
    with _arguments_named(to="format"):
        save_model(model, target, format, merge=merge)
    return target


def recipe(name: str, **changes: Any) -> Config:
    """The recipe of that name (`configs/NAME.py`), or in that Python file, with changes.

    A change is a field of `Config`; a group such as `train` takes a dict of its fields, or a whole group. Raises
    ValueError for a name that there is not, with the nearest one.

    >>> recipe("9b_lora", steps=1000, train=dict(global_batch_size=64)).train.global_batch_size
    64
    >>> recipe("9b_lora", train=dict(batch_size=64))
    Traceback (most recent call last):
    ValueError: there is no train.batch_size; did you mean train.micro_batch_size or train.global_batch_size?
    """
    return _change_fields(recipes.load_recipe(str(name)), changes, "")


def _change_fields(node: Any, changes: dict[str, Any], prefix: str) -> Any:
    """The dataclass with these fields changed, dicts in place of dataclasses field by field.

    Paths become strings and lists tuples, as a run's config.txt has them.
    """
    types = {field.name: field.type for field in dataclasses.fields(node)}
    values = {}
    for name, value in changes.items():
        if name not in types:
            group, dot, field = name.partition(".")
            near = [prefix + match for match in difflib.get_close_matches(name, types, n=2)]
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(prefix + n for n in types)}"
            if groups := [] if prefix else _groups_with(node, name):
                hint = f"did you mean {' or '.join(f'{known}=dict({name}=...)' for known in groups)}?"
            hint = f"give {group}=dict({field}=...)" if dot and group in types else hint
            raise ValueError(f"there is no {prefix}{name}; {hint}")
        if dataclasses.is_dataclass(getattr(node, name)):
            values[name] = _change_group(getattr(node, name), value, f"{prefix}{name}")
            continue
        value = str(value) if isinstance(value, Path) else tuple(value) if isinstance(value, list) else value
        if f"{prefix}{name}" in ("data.train", "data.eval") and isinstance(value, tuple):
            value = configs.join_sources(f"{prefix}{name}", [str(source) for source in value])
        if not config_text.matches_type(value, types[name]):
            raise ValueError(f"{prefix}{name} is {value!r}; it must be {config_text.describe_type(types[name])}")
        values[name] = value
    return dataclasses.replace(node, **values)


def _groups_with(config: Config, name: str) -> list[str]:
    """The groups of a config that have a field of that name."""
    groups = ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    return [known for known, group in groups if dataclasses.is_dataclass(group) and hasattr(group, name)]


def _change_group(group: Any, value: Any, name: str) -> Any:
    """A group of fields with the changes of a dict, or another group in its place."""
    if isinstance(value, dict):
        return _change_fields(group, value, f"{name}.")
    if not isinstance(value, type(group)):
        raise ValueError(f"{name} is {value!r}; give a dict of its fields, or a {type(group).__name__}")
    return value


def _check_config(config: Any) -> None:
    if not isinstance(config, Config):
        given = f"recipe({config!r})" if isinstance(config, str) else "recipe('tiny_lora')"
        raise ValueError(f"config is {config!r}; give a Config, such as gemma2_jax.{given}")


def _check_path(path: str | Path, name: str) -> None:
    if not isinstance(path, str | Path):
        raise ValueError(f"{name} is {path!r}; give a string or a Path")
    if not str(path):
        raise ValueError(f"{name} is empty; name what to write")


def _check_format(name: str) -> None:
    """Raises ValueError for a format that no checkpoint can be written in."""
    from gemma2_jax.convert.job import Format

    formats = get_args(Format)
    if name not in formats:
        near = difflib.get_close_matches(str(name).lower(), formats, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"there is no format {name!r}{hint} There are {', '.join(formats)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a training run leaves behind."""

    folder: Path  # the run's working directory
    step: int  # the last step taken
    losses: dict[int, float]  # training loss (nats per target token) by logged step, of the steps of this call
    eval_losses: dict[int, float]  # held-out loss by step, likewise
    program: "Program" = dataclasses.field(repr=False)
    state: "State" = dataclasses.field(repr=False)  # after the last step, on the devices
    stopped: str = ""  # what the run was told to stop by before its last step, such as train.stop_after

    @cached_property
    def model(self) -> "LoadedModel":
        """The trained model, with its adapter if it has one, from the weights that are on the devices."""
        from gemma2_jax.convert.opening import open_checkpoint
        from gemma2_jax.inference.loaded import wrap_weights

        checkpoint = open_checkpoint(self.folder)
        weights = {**self.state.frozen, **self.state.params}
        return wrap_weights(checkpoint, weights, self.program.mesh, self.program.config.compute.dtype)


def train(config: Config) -> Result:
    """Trains as the config says, and gives losses, the folder and, as `.model`, the trained model.

    The same config and working directory resume the run. Of several processes each calls it (`config.hosts`).

    SIGTERM, SIGUSR1 and `train.stop_after` end it after the step under way, which is saved. Ctrl-C does too, and raises
    KeyboardInterrupt then; the second one raises it at once.

    Raises ValueError for what cannot be done as asked, FloatingPointError when too many steps in a row are
    not finite, and OSError when the disk does not take what is written.

    >>> sizes = dict(sequence_length=64, global_batch_size=8, micro_batch_size=1, eval_batches=1)
    >>> config = recipe("tiny_lora", steps=2, workdir="out/run", train=sizes)
    >>> result = train(config)  # doctest: +ELLIPSIS
    run ...
    >>> sorted(result.losses), result.folder
    ([1, 2], PosixPath('out/run'))
    >>> save(result.model, "out/adapter", format="peft")
    PosixPath('out/adapter')
    """
    _check_config(config)
    platforms.prepare_process()
    from gemma2_jax.cluster import hosts
    from gemma2_jax.training import loop

    with hosts.process_group(config.hosts):
        result = loop.train(config)
    if result.stopped == hosts.INTERRUPT:
        raise KeyboardInterrupt(f"the run stopped after step {result.step}, whose checkpoint is saved")
    return Result(**{field.name: getattr(result, field.name) for field in dataclasses.fields(Result)})


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: "Format",
    adapter: str | Path | None = None,
    merge: bool = False,
    dtype: FileDType | None = None,
    hf_config: str | Path | None = None,
    drop: Sequence[str] = (),
    ranks: tuple[int, int] = (1, 1),
) -> Path:
    """Converts a checkpoint of any format into another, a layer at a time, and gives the folder that it wrote.

    Args:
      src: a folder, a .gguf file, or a Hub id.
      dst: folder or .gguf file to write, which must not exist yet; it appears whole or not at all.
      to: "hf", "orbax", "peft", "megatron", "megatron-legacy", "megatron-adapter", "gguf" or "gguf-adapter".
      adapter: an adapter to put on `src`.
      merge: add the adapter into the weights, in float32.
      dtype: of what is written, "float16" and "q8_0" by "gguf" alone. None: as stored.
      hf_config: folder or Hub id with the config.json of a Megatron checkpoint that has none, or with the tokenizer of
        a GGUF file.
      drop: patterns of names of a Hugging Face folder's tensors to leave out, such as "v_head.*".
      ranks: tensor-parallel ranks and pipeline stages that "megatron-legacy" is to have files for, or that are to load
        a "megatron-adapter" whose gate and up have an A each.

    Raises ValueError where `dst` cannot hold what `src` has, and says what to do instead.

    >>> convert("assets/tiny-gemma2", "out/megatron", to="megatron")
    PosixPath('out/megatron')
    """
    platforms.prepare_process()
    from gemma2_jax.convert.files.folder import expand_path
    from gemma2_jax.convert.job import Job
    from gemma2_jax.convert.opening import open_checkpoint
    from gemma2_jax.convert.writing import write_checkpoint

    _check_format(to)
    _check_path(dst, "dst")
    if dtype is not None and dtype not in get_args(FileDType):
        raise ValueError(f"dtype is {dtype!r}; it may be {', '.join(get_args(FileDType))}, or None")
    if isinstance(drop, str):
        raise ValueError(f"drop is {drop!r}; give a list of patterns, such as [{drop!r}]")
    if len(ranks) != 2 or not all(type(rank) is int for rank in ranks):
        raise ValueError(f"ranks is {ranks!r}; give two whole numbers, (tensor-parallel ranks, pipeline stages)")
    target = expand_path(dst)
    with _arguments_named():
        source = open_checkpoint(src, hf_config=hf_config, drop=drop)
        if adapter is not None:
            source = open_checkpoint(adapter, base=source)
        _log_notes(source)
        job = Job(source=source, to=to, merge=merge, dtype=dtype, ranks=ranks)
        for sentence in job.warnings:
            warnings.warn(_name_arguments(sentence), stacklevel=2)
        write_checkpoint(job, target)
    return target


def plan(config: Config, *, gpus: int = 8, device: str = "h100") -> "Plan":
    """What a training step of the config holds, does and sends on so many GPUs, without having any.

    The real step is compiled for described GPUs, in a process of its own, which takes up to a minute. `device` is a
    name of `planning.gpus.GPUS`, or a TOML file of a GPU.

    Raises ValueError where the run does not divide over the GPUs, and ImportError without the extra `plan`.

    >>> found = plan(recipe("tiny_lora", mesh=dict(tensor=2)), gpus=2)
    >>> found.fits, found.mesh
    (True, 'tensor 2')
    """
    from gemma2_jax.planning.gpus import find_gpu
    from gemma2_jax.planning.report import plan_in_subprocess

    _check_config(config)
    return plan_in_subprocess(config, gpus, find_gpu(device))
