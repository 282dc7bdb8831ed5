"""From documents to tokens, and which of them are learned.

All of a plain text is learned, the completion after a prompt, what the assistant says in a conversation; and the <eos>
at the end. `tokenizing` and `store` keep the tokens.
"""

import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma2_jax.config import DataConfig
from gemma2_jax.data import sources
from gemma2_jax.data.chat import open_chat_format, split_conversation
from gemma2_jax.data.records import BadRecord, Example
from gemma2_jax.data.report import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_TURNS = ["<start_of_turn>", "<end_of_turn>"]


def hide_torch() -> None:
    """Has transformers take torch for not installed, as tokenizers need none of it and it takes seconds and 500 MB.

    For processes that are this package's own: commands, and those that they start. It changes nothing where torch or
    transformers was imported before, and other code may import torch afterwards.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch, which is not needed
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None
    try:
        from transformers.utils.import_utils import is_torch_available

        is_torch_available()  # which keeps its answer
    finally:
        del modules["torch"]  # as other libraries take a module that has a name there for one that can be used


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
        tokenizer("")  # which looks at settings that loading does not
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
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {origin} has no bos_token or no eos_token; a document needs both")
    tokenizer.name_or_path = str(origin)
    return tokenizer


def gemma_chat_template() -> str:
    """The format that Gemma 2's instruction-tuned models were trained on, as a Jinja template."""
    return (Path(__file__).parent / "gemma_chat_template.jinja").read_text(encoding="utf-8")


def encode_examples(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast", data: DataConfig, report: Report
) -> Iterator[tuple[list[int], bytearray]]:
    """Yields each document's tokens from <bos> to <eos>, and a byte for each: 1 if it counts in the loss, 0 if not.

    A prompt and its completion are encoded separately and joined as they are, with no space between and no chat format.
    So are the turns of a conversation, which the tokenizer's chat template writes. A document that the template refuses
    is an error that names it or is counted in the report, as `data.on_bad` says.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert isinstance(bos, int) and isinstance(eos, int)  # load_tokenizer made sure
    documents = list(_split_examples(examples, tokenizer, data, report))
    texts = [text for _, pieces in documents for text, _ in pieces]
    # The tokenizer's own call computes where in the text each token is, too, which takes a third longer.
    encoded = iter(tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    for example, pieces in documents:
        tokens: list[int] = []
        learned = bytearray()
        for _, is_learned in pieces:
            piece_tokens = next(encoded).ids
            learned += (b"\1" if is_learned else b"\0") * len(piece_tokens)
            tokens += piece_tokens
        if tokens[:1] != [bos]:  # chat templates write it, and so may prompts
            tokens.insert(0, bos)
            learned.insert(0, False)
        learned[0] = False  # nothing comes before it to predict it from
        tokens.append(eos)
        last = example.turns[-1] if example.turns else None
        learned.append(last is None or (last.role == "assistant" and last.is_learned))
        report.count(example.shape, len(tokens), example.where)
        yield tokens, learned


def _split_examples(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast", data: DataConfig, report: Report
) -> Iterator[tuple[Example, list[tuple[str, bool]]]]:
    """Yields each document, split into texts to be encoded separately, and of each whether it is learned."""
    chat = None
    names = {str(tokenizer.bos_token), str(tokenizer.eos_token), *_TURNS}
    control = re.compile("|".join(map(re.escape, sorted(names))))
    for example in examples:
        if not example.turns:
            _note_control_tokens(example, control, report)
            yield example, [(example.prompt, False), (example.completion, True)]
            continue
        chat = chat or open_chat_format(tokenizer, data.repeated_roles)
        try:
            pieces = split_conversation(example, chat, report)
        except BadRecord as error:
            sources.reject(error, data, report)
        else:
            _note_control_tokens(example, control, report)
            yield example, pieces


def _note_control_tokens(example: Example, control: re.Pattern[str], report: Report) -> None:
    """Counts a document whose text has control tokens in it, which are tokenized as such, as transformers does.

    Who writes a prompt and its completion may write a chat format into them; elsewhere it is seldom meant.
    """
    texts = [turn.content for turn in example.turns] if example.turns or example.prompt else [example.completion]
    for token in sorted({match[0] for text in texts for match in control.finditer(text)}):
        report.change(f"{token} in the text is read as that control token, not as its characters", example.where)
