"""From documents to tokens: each document is encoded once, into files that are memory-mapped from then on.

A store holds whole documents, whatever the length of a row: `packing` cuts them. This module decides which tokens are
learned: all of a plain text, the completion after a prompt, what the assistant says in a conversation; and the <eos>
at the end. Memory does not grow with the number of documents.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gemma2_jax.config import DataConfig
from gemma2_jax.data import sources
from gemma2_jax.data.chat import open_chat_format, split_conversation
from gemma2_jax.data.records import BadRecord, Example
from gemma2_jax.data.report import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_TURNS = ["<start_of_turn>", "<end_of_turn>"]
_FORMAT = 2  # to be raised when the code writes other tokens or other files for the same documents
_DOCUMENTS_PER_CALL = 256  # of the tokenizer, which takes a few hundred bytes of memory for each token


@dataclass(frozen=True, kw_only=True)
class Store:
    """Encoded documents, memory-mapped, one after another."""

    tokens: np.ndarray  # int32 [tokens]
    learned: np.ndarray  # bool [tokens]: whether the token counts in the loss, when predicted
    offsets: np.ndarray  # int64 [documents + 1]: where each document begins, and where the last ends
    folder: Path | None = None  # where its files are, and plans of its rows; None: in memory alone


def load_tokenizer(folder: str | Path, origin: str | Path | None = None) -> "PreTrainedTokenizerFast":
    """The tokenizer in a folder, with Gemma's chat template if it has Gemma's turn tokens and no template of its own.

    `origin` is the place that it was unpacked from, if it was.

    Raises ValueError if there is no tokenizer, or none that can be used.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch, which is not needed
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    origin = origin or folder
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"{origin} holds no tokenizer; it needs tokenizer.json and tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (ImportError, MemoryError):  # of this machine, not of the files
        raise
    except Exception as error:  # the libraries raise KeyError, TypeError and Exception itself for damaged files
        raise ValueError(f"the tokenizer of {origin} is damaged ({error!r}); copy its files again") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{origin}/tokenizer_config.json asks for a tokenizer that does not read tokenizer.json")
    if tokenizer.chat_template is None and tokenizer.convert_tokens_to_ids(_TURNS) != [tokenizer.unk_token_id] * 2:
        # Tokenizers of models that are not instruction-tuned have the tokens, but not the template.
        tokenizer.chat_template = gemma_chat_template()
        logger.warning("%s has no chat template; conversations are written in Gemma's format", origin)
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {origin} has no bos_token or no eos_token; a document needs both")
    tokenizer.name_or_path = str(origin)
    return tokenizer


def gemma_chat_template() -> str:
    """The format that Gemma 2's instruction-tuned models were trained on, as a Jinja template."""
    return (Path(__file__).parent / "gemma_chat_template.jinja").read_text(encoding="utf-8")


def encode_examples(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast", data: DataConfig, report: Report
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yields each document's tokens from <bos> to <eos>, and which of them count in the loss when predicted.

    A prompt and its completion are encoded separately and joined as they are, with no space between and no chat format.
    So are the turns of a conversation, which the tokenizer's chat template writes. A document that the template refuses
    is an error that names it or is counted in the report, as `data.on_bad` says.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert isinstance(bos, int) and isinstance(eos, int)  # load_tokenizer made sure
    documents = list(_split_examples(examples, tokenizer, data, report))
    texts = [text for _, pieces in documents for text, _ in pieces]
    encoded = iter(tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
    for example, pieces in documents:
        tokens: list[int] = []
        learned: list[bool] = []
        for _, is_learned in pieces:
            piece_tokens = next(encoded)
            tokens += piece_tokens
            learned += [is_learned] * len(piece_tokens)
        if tokens[:1] != [bos]:  # chat templates write it, and so may prompts
            tokens.insert(0, bos)
            learned.insert(0, False)
        learned[0] = False  # nothing comes before it to predict it from
        last = example.turns[-1] if example.turns else None
        report.shapes[example.shape] += 1
        yield [*tokens, eos], [*learned, last is None or (last.role == "assistant" and last.is_learned)]


def _split_examples(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast", data: DataConfig, report: Report
) -> Iterator[tuple[Example, list[tuple[str, bool]]]]:
    """Yields each document, split into texts to be encoded separately, and of each whether it is learned."""
    chat = None
    for example in examples:
        if not example.turns:
            yield example, [(example.prompt, False), (example.completion, True)]
            continue
        chat = chat or open_chat_format(tokenizer, data.repeated_roles)
        try:
            pieces = split_conversation(example, chat, report)
        except BadRecord as error:
            sources.reject(error, data, report)
        else:
            yield example, pieces


def build_store(
    data: DataConfig, split: sources.Split, tokenizer: "PreTrainedTokenizerFast", cache: Path, *, show: bool = False
) -> Store:
    """The store of one split: the one in `cache` if nothing that it depends on has changed, else a new one.

    A store is written to a temporary folder and then renamed, so that a store of that name is always whole. Processes
    that share `cache` wait for the first; on a file system without locks each writes, and the first to finish wins.
    `show` prints the progress. Raises ValueError if the split has no documents, or a malformed one.
    """
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"{split}-{_fingerprint(data, split, tokenizer)}"
    with (cache / "lock").open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix=f"{split}-") as temporary:
                partial_store = Path(temporary) / "store"
                try:
                    _write_store(partial_store, data, split, tokenizer, show=show)
                except OSError as error:
                    raise OSError(
                        f"tokenized data could not be written to {cache} ({error}); make room there, or give a "
                        "--workdir on another disk"
                    ) from error
                try:
                    partial_store.rename(folder)
                except OSError:
                    if not folder.exists():  # it exists if another process has finished before
                        raise
    return _open_store(folder)


def _open_store(folder: Path) -> Store:
    """The store in a folder. Raises ValueError where its files are not whole."""
    reason = "its files are of unlike lengths"
    try:
        store = Store(
            tokens=np.memmap(folder / "tokens", np.int32, "r"),
            learned=np.memmap(folder / "learned", np.bool_, "r"),
            offsets=np.load(folder / "offsets.npy", mmap_mode="r"),
            folder=folder,
        )
        if len(store.tokens) == len(store.learned) == store.offsets[-1]:
            return store
    except (ValueError, OSError, EOFError, IndexError) as error:
        reason = str(error) or type(error).__name__
    raise ValueError(
        f"the tokenized data in {folder} is damaged: {reason}; delete {folder.parent}, and the same command makes it "
        "again"
    )


def _write_store(
    folder: Path, data: DataConfig, split: sources.Split, tokenizer: "PreTrainedTokenizerFast", *, show: bool
) -> None:
    folder.mkdir()
    offsets, report = array("q", [0]), Report()
    columns = (TextColumn("documents"), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True, quiet=not show)
    purpose = "training" if split == "train" else "held-out"
    message = f"tokenizing {purpose} data from {sources.open_source(data, split)}"
    for sentence in (message, *sources.choose_places(data, split).notes):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with (folder / "tokens").open("wb") as tokens_file, (folder / "learned").open("wb") as learned_file, progress:
        task = progress.add_task("", total=None)
        for examples in itertools.batched(sources.read_examples(data, split, report), _DOCUMENTS_PER_CALL):
            encoded = list(encode_examples(examples, tokenizer, data, report))
            if not encoded:
                continue
            tokens, learned = zip(*encoded, strict=True)
            np.fromiter(itertools.chain(*tokens), np.int32).tofile(tokens_file)
            np.fromiter(itertools.chain(*learned), np.bool_).tofile(learned_file)
            offsets.extend(itertools.islice(itertools.accumulate(map(len, tokens), initial=offsets[-1]), 1, None))
            progress.advance(task, len(examples))
    if len(offsets) == 1:
        raise ValueError(
            f"data.eval_fraction {data.eval_fraction} leaves no document of {data.train} to train on; give a smaller "
            "one, or 0 to hold out none, or other data as --data.eval"
        )
    for sentence in report.describe():
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    np.save(folder / "offsets.npy", np.frombuffer(offsets, np.int64))


def _fingerprint(data: DataConfig, split: sources.Split, tokenizer: "PreTrainedTokenizerFast") -> str:
    """A digest of everything that the tokens of a split depend on."""
    contents = sources.fingerprint(data, split)
    choices = [data.kind, data.columns, data.prompt_template, data.repeated_roles, data.on_bad]
    share = None if data.eval else data.eval_fraction
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template]
    everything = json.dumps([_FORMAT, split, choices, share, contents, ids, tokenizer.backend_tokenizer.to_str()])
    return hashlib.blake2b(everything.encode(), digest_size=8).hexdigest()
