"""The model that a command generates with: the options that name its checkpoint, and how that is opened.

Nothing here imports JAX before a checkpoint is opened, so that `--help` and mistakes answer at once.
"""

import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma2_jax import command_line
from gemma2_jax.inference.settings import Sampling
from gemma2_jax.model_config import DType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from gemma2_jax.convert.checkpoints import Checkpoint
    from gemma2_jax.inference.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which model generates."""

    checkpoint: str  # a training run's folder, a Hugging Face, Orbax or Megatron folder, a GGUF file, or a Hub id
    adapter: str | None = None  # an adapter to put on it: a PEFT or Orbax folder, or a run
    hf_config: str | None = None  # folder or Hub id with the config.json and tokenizer that a Megatron checkpoint lacks
    dtype: DType | None = None  # of weights and arithmetic; None: float32 on CPU, bfloat16 elsewhere
    int8: bool = False  # keep matrices in int8, with a scale for each output; arithmetic is in dtype all the same
    tensor: int = 1  # devices that share each weight and cache; a model too large for one device needs several
    data: int = 1  # copies of the model, each on devices of its own and with its share of the texts

    def __post_init__(self) -> None:
        command_line.check_paths(self, "checkpoint", "adapter", "hf_config")
        for name in ("tensor", "data"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def open_source(source: Source) -> "tuple[Checkpoint, PreTrainedTokenizerFast]":
    """The checkpoint and its tokenizer, for `load_decoder`; no weight is read. Its notes go to standard error.

    Raises ValueError without its model or its tokenizer.
    """
    from gemma2_jax.data import encoding

    encoding.hide_torch()
    from gemma2_jax.convert.formats.companions import load_tokenizer
    from gemma2_jax.convert.opening import open_checkpoint
    from gemma2_jax.inference.loaded import complete_config

    model = open_checkpoint(source.checkpoint, hf_config=source.hf_config)
    checkpoint = open_checkpoint(source.adapter, base=model) if source.adapter else model
    complete_config(checkpoint)
    if checkpoint.tokenizer is None:
        raise ValueError(
            f"{checkpoint.path} has no tokenizer; copy tokenizer.json and tokenizer_config.json of its model there"
        )
    for note in checkpoint.notes:
        print(f"note: {command_line.escape(note)}", file=sys.stderr)
    if targets := checkpoint.adapter.unmergeable_targets:
        print(
            f"the adapter of {' and '.join(targets)} is added after the post-norm (adapter.after_norm), where no "
            "weight can take it in; it is computed beside the weights, which slows down every step",
            file=sys.stderr,
        )
    return checkpoint, load_tokenizer(checkpoint.tokenizer)


def load_source(source: Source, checkpoint: "Checkpoint") -> "Decoder":
    """The opened checkpoint on the devices that the options ask for, ready to generate; see `load_decoder`.

    Raises ValueError if there are fewer devices, or the model does not divide over them.
    """
    import jax

    from gemma2_jax.config import MeshConfig
    from gemma2_jax.inference.loaded import load_decoder
    from gemma2_jax.mesh import make_mesh

    devices, needed = jax.local_devices(), source.tensor * source.data
    if needed > len(devices):
        raise ValueError(
            f"tensor {source.tensor} x data {source.data} are {needed} devices, and this process has {len(devices)}; "
            "ask for fewer"
        )
    mesh = make_mesh(MeshConfig(data=source.data, tensor=source.tensor), devices[:needed])
    return load_decoder(checkpoint, source.dtype, mesh, int8=source.int8)


def print_defaults(
    checkpoint: "Checkpoint",
    tokenizer: "PreTrainedTokenizerFast",
    stop: Collection[int],
    sampling: Sampling,
    max_new_tokens: int,
) -> None:
    """Says on standard error what ends a text, which settings are in vain, and what the checkpoint suggests."""
    from gemma2_jax.inference.defaults import describe_stop, describe_suggestion

    print(command_line.escape(describe_stop(set(stop), tokenizer, max_new_tokens)), file=sys.stderr)
    if idle := sampling.list_idle():
        names = " and ".join(f"--{name.replace('_', '-')}" for name in idle)
        print(f"note: {names} without --temperature: of no effect, as the most likely token is taken", file=sys.stderr)
    if settings := find_suggestion(checkpoint, sampling):
        print(describe_suggestion(settings), file=sys.stderr)


def find_suggestion(checkpoint: "Checkpoint", sampling: Sampling) -> dict[str, float]:
    """The sampling settings that the checkpoint suggests, where the most likely tokens are taken and they can be."""
    from gemma2_jax.inference.defaults import suggested_sampling

    settings = suggested_sampling(checkpoint) if sampling.temperature == 0 else {}
    return settings if _is_usable(settings) else {}


def _is_usable(settings: dict[str, Any]) -> bool:
    try:
        Sampling(**settings)
    except ValueError:
        return False
    return True
