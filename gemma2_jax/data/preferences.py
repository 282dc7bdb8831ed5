"""Preferences: a prompt with an answer that was chosen and one that was rejected, as a pair of rows.

An objective that learns from such pairs is not here yet, and `records` names them where they are trained on. What it
would read is made here: two rows of one length, of which each has the prompt and one of the answers.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gemma2_jax.config import DataConfig
from gemma2_jax.data.encoding import encode_examples
from gemma2_jax.data.packing import empty_batch
from gemma2_jax.data.records import BadRecord, Example, make_example
from gemma2_jax.data.report import Report
from gemma2_jax.data.wording import quote_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ANSWERS = ("chosen", "rejected")


def make_pair(record: dict, where: str, data: DataConfig) -> tuple[Example, Example]:
    """The documents of the chosen and of the rejected answer. Raises BadRecord if the record is no preference.

    Prompt and answers are texts or lists of messages (huggingface.co/docs/trl/dataset_formats). Where there is no
    prompt, it is what the messages of both begin with. Nothing of the prompt is learned.
    """
    if not all(isinstance(record.get(answer), str | list) for answer in ANSWERS):
        columns = quote_list(record) or "no columns"
        raise BadRecord(where, "not a preference", f"has {columns}; a preference has 'chosen' and 'rejected'")
    chosen, rejected = (_make_document(record, answer, where, data) for answer in ANSWERS)
    shared = 0
    while shared < min(len(chosen.turns), len(rejected.turns)) and chosen.turns[shared] == rejected.turns[shared]:
        shared += 1
    if chosen == rejected:
        raise BadRecord(where, "not a preference", "has the same answer twice; remove the record")
    return _forget_prompt(chosen, shared), _forget_prompt(rejected, shared)


def _make_document(record: dict, answer: str, where: str, data: DataConfig) -> Example:
    if isinstance(record[answer], list):
        prompt = record.get("prompt") or []
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        begins_with_prompt = record[answer][: len(before)] == before
        return make_example(
            {"messages": record[answer] if begins_with_prompt else before + record[answer]}, where, data
        )
    return make_example({"prompt": record.get("prompt") or "", "completion": record[answer]}, where, data)


def _forget_prompt(example: Example, shared: int) -> Example:
    turns = [
        replace(turn, is_learned=turn.is_learned and number >= shared) for number, turn in enumerate(example.turns)
    ]
    return replace(example, turns=tuple(turns))


def make_rows(
    pair: tuple[Example, Example], tokenizer: "PreTrainedTokenizerFast", data: DataConfig, length: int
) -> dict[str, np.ndarray]:
    """The arrays of `packing.Rows`, each [2, T], of the chosen and of the rejected answer, T being `length`.

    Raises BadRecord if an answer is longer than that, as a pair that is cut compares other texts.
    """
    rows = []
    for tokens, learned in encode_examples(pair, tokenizer, data, Report()):
        known = len(tokens) - 1  # tokens that another follows
        if known > length:
            sentence = f"takes a row of {known:,} and rows have {length:,}; raise train.sequence_length"
            raise BadRecord(pair[0].where, "too long", sentence)
        row = empty_batch(length)
        row["tokens"][: known + 1] = tokens[:length]
        row["segments"][: known + 1] = 1
        row["positions"][: known + 1] = np.arange(min(known + 1, length))
        row["targets"][:known] = tokens[1:]
        row["weights"][:known] = learned[1:]
        rows.append(row)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
