"""An opened checkpoint: what it holds, its arrays, and the model that it is put on where it is an adapter.

`opening` opens them. Nothing here knows a format, and nothing writes.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from gemma2_jax.convert.files.memory import Index
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.sources import GrownEmbedding, Source, load_array
from gemma2_jax.dims import Abstract
from gemma2_jax.model_config import AdapterConfig, ModelConfig


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a folder holds. The arrays are read from `sources`."""

    format: Literal["huggingface", "peft", "orbax", "run", "megatron", "deepmind", "gguf"]
    path: Path
    model: ModelConfig | None = None  # None: an adapter whose model is not at hand
    adapter: AdapterConfig = field(default_factory=AdapterConfig)  # kind "none": there is no adapter
    base: str = ""  # the folder or Hub id of the adapter's model, as the adapter's maker named it
    hf: dict[str, Any] | None = None  # the config.json that came with the weights
    tokenizer: Path | None = None  # the folder with the tokenizer, or the GGUF file that it is in
    generation: Path | None = None  # the file with the defaults of generation
    sources: tuple[Source, ...] = ()
    # Whether an adapter has trained rows of an embedding that was grown for tokens of its tokenizer. As its model lacks
    # them, the embedding goes with the adapter.
    grown: bool = False
    layout: str = ""  # which of the format's layouts the files have, where there are several
    notes: tuple[str, ...] = ()  # sentences about what a user should know

    @property
    def shapes(self) -> Abstract:
        """The shape and the stored dtype of every array, by path."""
        return {path: shape for source in self.sources for path, shape in source.shapes.items()}

    def find_source(self, path: str) -> Source:
        """The source that an array is read from, which is the last that has it: an adapter's replaces the base's."""
        return next(source for source in reversed(self.sources) if path in source.shapes)

    @property
    def has_weights(self) -> bool:
        """Whether the whole model is there, and not only its config or an adapter."""
        return all(row.path in self.shapes for row in table.MODEL)

    @property
    def lacks_base(self) -> bool:
        """Whether it is an adapter alone: the weights that the adapter is added to were neither given nor found."""
        return self.adapter.kind != "none" and not self.has_weights

    def describe_missing_base(self) -> str:
        """The beginning of a sentence that asks for the model of an adapter alone."""
        name = self.base or "a model that it does not name"
        return f"{self.path} is an adapter to {name}, whose weights are not at hand"


def load_weights(checkpoint: Checkpoint, wanted: Abstract) -> dict[str, jax.Array]:
    """The arrays of `wanted`, by path, in its shapes, dtypes and shardings (by default on the first device).

    Stacks of layers may be wanted longer than they are stored; zeros then follow the last layer. The embedding may be
    wanted with more rows, each of which is then the mean of those stored (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models"). transformers' resize_token_embeddings draws them from a normal
    distribution about that mean with 1e-9 times the rows' covariance, which bfloat16 does not tell from the mean.

    Raises ValueError naming an array that the checkpoint lacks, or has in another shape.
    """
    check_wanted(checkpoint, wanted)
    return {path: load_array(checkpoint.find_source(path), path, want) for path, want in wanted.items()}


def check_wanted(checkpoint: Checkpoint, wanted: Abstract) -> None:
    """Raises ValueError naming an array that the checkpoint lacks, or has in another shape; see `load_weights`."""
    shapes = checkpoint.shapes
    for path, want in wanted.items():
        if path not in shapes:
            raise ValueError(f"{checkpoint.path} has no {path}; it holds {_describe_sources(checkpoint)}")
        stored = shapes[path].shape
        may_grow = path.startswith("blocks/") or path == "embedding"
        longer = may_grow and stored == (stored[0], *want.shape[1:]) < want.shape
        if stored != want.shape and not longer:
            raise ValueError(
                f"{checkpoint.path} is a checkpoint of another config: it has {path} with shape {stored}, and "
                f"{want.shape} is wanted"
            )


def read_array(checkpoint: Checkpoint, path: str, index: Index) -> np.ndarray:
    """The slices `index` of an array as it is stored, in host memory. A layer or some rows at a time need little.

    Raises ValueError where the files are damaged.
    """
    source = checkpoint.find_source(path)
    return source.read(path, index, source.shapes[path].dtype)


def attach_base(
    adapted: Checkpoint,
    base: Checkpoint | None,
    open_source: Callable[[ModelConfig], Source],
    base_name: str | None,
    vocabulary: int | None = None,
) -> Checkpoint:
    """An adapter on its model `base`, whose vocabulary it may have grown.

    Without a base the adapter's arrays are not opened, as their shapes follow from the model's config.
    """
    if base is None:
        sources = (open_source(adapted.model),) if adapted.model else ()
        return replace(adapted, base=base_name or "", sources=sources)
    if base.adapter.kind != "none":
        raise ValueError(f"{base.path} has an adapter already, {adapted.path} is another; merge the first one first")
    assert base.model is not None
    model = adapted.model or replace(base.model, vocab_size=vocabulary or base.model.vocab_size)
    if replace(model, max_length=base.model.max_length, vocab_size=base.model.vocab_size) != base.model:
        raise ValueError(f"{adapted.path} is an adapter to another model than {base.path}; give its own, {base_name}")
    notes = adapted.notes
    if model.vocab_size != base.model.vocab_size:
        tokenizer = (
            "its own tokenizer is used" if adapted.tokenizer else "copy the tokenizer of that training beside it"
        )
        notes += (
            f"it brings an embedding of {model.vocab_size:,} tokens in place of {base.model.vocab_size:,}, as its "
            f"vocabulary was grown in training; {tokenizer}",
        )
    # Weights that the adapter replaces are read from it, as its arrays come last.
    sources = (*grow_embedding(base.sources, model), open_source(model))
    larger = model.vocab_size > base.model.vocab_size and not adapted.adapter.replaces("embedding")
    named = base_name or str(base.path)
    grown = adapted.grown or larger
    return inherit_files(replace(adapted, model=model, base=named, sources=sources, notes=notes, grown=grown), base)


def grow_embedding(sources: tuple[Source, ...], model: ModelConfig) -> tuple[Source, ...]:
    """The sources, and one with the embedding as large as the model's, where theirs is smaller."""
    holder = next((source for source in reversed(sources) if "embedding" in source.shapes), None)
    if holder is None or holder.shapes["embedding"].shape[0] >= model.vocab_size:
        return sources
    return (*sources, GrownEmbedding(source=holder, rows=model.vocab_size))


def inherit_files(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """The checkpoint with the config.json, the tokenizer and the generation config of its base where it has none."""
    return replace(
        checkpoint,
        hf=checkpoint.hf or base.hf,
        tokenizer=checkpoint.tokenizer or base.tokenizer,
        generation=checkpoint.generation or base.generation,
        notes=(*base.notes, *checkpoint.notes),
    )


def refuse_base(path: Path, model: ModelConfig, base: Checkpoint | None) -> None:
    """Raises ValueError where a base with weights was given for a whole model, or a base of another config."""
    if base is not None and base.sources:
        raise ValueError(f"{path} is not an adapter alone, so it takes no base model; {base.path} was given as one")
    if base and base.model and replace(model, max_length=base.model.max_length) != base.model:
        differences = describe_model_differences(model, base.model)
        raise ValueError(f"{path} is of another model than was asked for ({differences})")


def describe_model_differences(model: ModelConfig, requested: ModelConfig) -> str:
    """The fields in which two configs differ, with both values, or nothing."""
    values = {
        field.name: (getattr(model, field.name), getattr(requested, field.name)) for field in dataclasses.fields(model)
    }
    return ", ".join(f"{name} {value} and not {other}" for name, (value, other) in values.items() if value != other)


def _describe_sources(checkpoint: Checkpoint) -> str:
    parts = [f"{len(source.shapes)} arrays such as {next(iter(source.shapes))}" for source in checkpoint.sources]
    return " and ".join(parts) or f"an adapter whose model is not at hand ({checkpoint.base or 'not named'})"
