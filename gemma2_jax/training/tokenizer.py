"""The tokenizer of a run: which it is, how it is kept, and what a larger one makes of the model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from gemma2_jax.cluster import hosts
from gemma2_jax.config import Config
from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.convert.files.folder import atomic_folder, tokenizer_folder
from gemma2_jax.convert.formats.companions import copy_companions, load_tokenizer
from gemma2_jax.convert.formats.hf_config import hf_config
from gemma2_jax.convert.opening import locate_folder
from gemma2_jax.data.encoding import gemma_chat_template
from gemma2_jax.training.step import Program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ADDED = "added"  # stands for the tokens that the tokenizer has beyond the model's, in `adapter.trainable_tokens`
_MULTIPLE = 128  # of rows that an embedding grows to, as Megatron has it: so that the axes of a mesh divide them


def load_run_tokenizer(config: Config, source: Checkpoint | None, *, resumes: bool) -> "PreTrainedTokenizerFast":
    """The tokenizer of a run: its own copy if it resumes, else the one given, else the model's.

    Raises ValueError where there is none that will do.
    """
    with hosts.process_zero_first("load_run_tokenizer"):  # which may download it
        kept = tokenizer_folder(_kept_folder(config)) if resumes else None
        return load_tokenizer(kept or _find_tokenizer(config, source))


def keep_tokenizer(config: Config, source: Checkpoint | None, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Copies a tokenizer's files and the model's config.json to WORKDIR/tokenizer, so that a run needs no others."""
    folder = _kept_folder(config)
    if jax.process_index() == 0 and Path(tokenizer.name_or_path) != folder:
        shutil.rmtree(folder, ignore_errors=True)
        with atomic_folder(folder, 0) as partial_folder:
            _write_tokenizer(partial_folder, config, source, tokenizer)


def _kept_folder(config: Config) -> Path:
    return config.output / "tokenizer"


def _find_tokenizer(config: Config, source: Checkpoint | None) -> Path:
    if config.data.tokenizer:
        return locate_folder(config.data.tokenizer, weights=False)
    if source and source.tokenizer:
        return source.tokenizer
    start = f"init {config.init} has no tokenizer beside its weights" if config.init else "there is no tokenizer"
    raise ValueError(f"{start}; give --data.tokenizer, a folder or Hub id")


def _write_tokenizer(
    folder: Path, config: Config, source: Checkpoint | None, tokenizer: "PreTrainedTokenizerFast"
) -> None:
    copy_companions(Path(tokenizer.name_or_path), source.generation if source else None, folder)
    template = folder / "chat_template.jinja"
    given = config.data.kind == "instructions" and tokenizer.chat_template == gemma_chat_template()
    if given and not template.exists():  # `load_tokenizer` gave it, and the data was written so
        template.write_text(gemma_chat_template(), encoding="utf-8")
    dtype = config.compute.trained_dtype if config.adapter.kind == "none" else config.compute.frozen_dtype
    original = source.hf if source else None
    (folder / "config.json").write_text(json.dumps(hf_config(config.model, dtype, original), indent=2) + "\n")


def find_tokens(config: Config, source: Checkpoint | None, tokenizer: "PreTrainedTokenizerFast") -> Config:
    """The config with ids in place of the texts in `adapter.trainable_tokens`, so that no tokenizer is needed to know.

    Raises ValueError naming a text that is not one token, or the word for added tokens where there are none.
    """
    ids = list[int]()
    for token in config.adapter.trainable_tokens:
        if isinstance(token, int):
            ids.append(token)
        elif token == ADDED:
            rows, entries = _stored_rows(config, source), vocabulary_entries(tokenizer)
            if entries <= rows:
                raise ValueError(
                    f"adapter.trainable_tokens has {ADDED!r}, and the tokenizer of {tokenizer.name_or_path} has no "
                    f"tokens beyond the {rows:,} of the model; give --data.tokenizer one with tokens added, or give ids"
                )
            ids += range(rows, entries)
        else:
            found = tokenizer.encode(token, add_special_tokens=False)
            if len(found) != 1:
                raise ValueError(
                    f"adapter.trainable_tokens has {token!r}, which the tokenizer of {tokenizer.name_or_path} makes "
                    f"{len(found)} tokens of, {found}; give one of their ids, or a tokenizer to which it was added"
                )
            ids += found
    adapter = replace(config.adapter, trainable_tokens=tuple(dict.fromkeys(ids)))
    return replace(config, adapter=adapter)


def without_texts(config: Config) -> Config:
    """The config with ids alone in `adapter.trainable_tokens`, for what is checked before the tokenizer is read."""
    ids = tuple(token for token in config.adapter.trainable_tokens if isinstance(token, int))
    known = tuple(token for token in ids if token < config.model.vocab_size)  # the others may be those of added tokens
    return replace(config, adapter=replace(config.adapter, trainable_tokens=known))


def grow_vocabulary(config: Config, source: Checkpoint | None, tokenizer: "PreTrainedTokenizerFast") -> Config:
    """The config with as many rows of the embedding as a tokenizer with added tokens takes.

    `load_weights` says what the new rows are. Raises ValueError where the tokenizer is larger than the model and not
    the model's own with tokens added, or where the run would not train the new rows.
    """
    entries, rows = vocabulary_entries(tokenizer), _stored_rows(config, source)
    larger = f"the tokenizer of {tokenizer.name_or_path} has {entries:,} entries, and the embedding {rows:,} rows"
    if entries <= rows:
        if config.model.vocab_size != rows:
            raise ValueError(
                f"{source.path if source else ''} has {rows:,} rows in its embedding, and model.vocab_size is "
                f"{config.model.vocab_size:,}, which its tokenizer does not need; give --model.vocab_size {rows}"
            )
        return config
    rounded = -(-entries // _MULTIPLE) * _MULTIPLE
    if source is None:
        raise ValueError(f"{larger}; give --model.vocab_size {rounded}, or another tokenizer")
    _check_extended(tokenizer, source, larger)
    trained = config.adapter.kind == "none" or config.adapter.replaces("embedding")
    if not trained and (missing := {*range(rows, entries)} - {*config.adapter.token_ids}):
        raise ValueError(
            f"{larger}; with adapter.kind {config.adapter.kind} {len(missing)} rows of added tokens would not be "
            f"trained. Train them too, with --adapter.trainable_tokens {ADDED}, or the whole embedding, with "
            "--adapter.modules_to_save embedding, or the whole model, with --adapter.kind none or a recipe whose name "
            "ends in _sft, or use the model's own tokenizer"
        )
    wanted = config.model.vocab_size if config.model.vocab_size >= entries else rounded
    return replace(config, model=replace(config.model, vocab_size=wanted))


def _stored_rows(config: Config, source: Checkpoint | None) -> int:
    """The rows of the embedding that a run starts from."""
    return source.model.vocab_size if source and source.model else config.model.vocab_size


def vocabulary_entries(tokenizer: "PreTrainedTokenizerFast") -> int:
    """How many rows of the embedding a tokenizer's numbers take."""
    return max(tokenizer.get_vocab().values()) + 1


def _check_extended(tokenizer: "PreTrainedTokenizerFast", source: Checkpoint, larger: str) -> None:
    """Raises ValueError where a token of the model's own tokenizer has another number in this one."""
    if source.tokenizer is None or source.tokenizer == Path(tokenizer.name_or_path):
        return
    numbers = tokenizer.get_vocab()
    for token, number in load_tokenizer(source.tokenizer).get_vocab().items():
        if numbers.get(token, number) != number:
            raise ValueError(
                f"{larger}; it is not the model's own with tokens added, as {token!r} is {numbers[token]} in it and "
                f"{number} in {source.tokenizer}. Add tokens to the model's own tokenizer"
            )


def describe_vocabulary(program: Program, source: Checkpoint | None) -> str | None:
    """How the embedding grew for the run's tokenizer, if it did."""
    rows = program.config.model.vocab_size
    if source is None or source.model is None or source.model.vocab_size == rows:
        return None
    stored = source.model.vocab_size
    return (
        f"{stored:,} rows of {source.path} + {rows - stored:,} for added tokens = {rows:,} (model.vocab_size); a new "
        "row starts as their mean"
    )
