"""Preferences as pairs of rows: what TRL's forms become, and that nothing of a prompt is learned."""

import numpy as np
import pytest

from gemma2_jax.config import DataConfig
from gemma2_jax.data.preferences import make_pair, make_rows
from gemma2_jax.data.records import BadRecord

USER = {"role": "user", "content": "if"}
ANSWERS = [{"role": "assistant", "content": text} for text in ("or", "x")]
CHAT = [{"role": "user", "content": "is"}, {"role": "assistant", "content": "in"}, USER]

# In each, the model is to learn "or" rather than "x".
FORMS = {
    "texts": {"prompt": "if ", "chosen": "or", "rejected": "x"},
    "texts without a prompt": {"chosen": "or", "rejected": "x"},
    "messages": {"prompt": [USER], "chosen": ANSWERS[:1], "rejected": ANSWERS[1:]},
    "messages and a text": {"prompt": "if", "chosen": ANSWERS[:1], "rejected": ANSWERS[1:]},
    "messages without a prompt": {"chosen": [*CHAT, ANSWERS[0]], "rejected": [*CHAT, ANSWERS[1]]},
    "messages that repeat the prompt": {"prompt": CHAT, "chosen": [*CHAT, ANSWERS[0]], "rejected": [*CHAT, ANSWERS[1]]},
}


@pytest.mark.parametrize("name", FORMS)
def test_pairs(name, tokenizer):
    pair = make_pair(FORMS[name], "a:1", DataConfig())
    rows = make_rows(pair, tokenizer, DataConfig(), 48)
    assert {array.shape for array in rows.values()} == {(2, 48)}
    ends = ["<end_of_turn>", "<eos>"] if pair[0].turns else ["<eos>"]
    for row, answer in enumerate(("or", "x")):
        learned = rows["targets"][row][rows["weights"][row] > 0]
        assert tokenizer.convert_ids_to_tokens(learned) == [answer, *ends]
        length = int(rows["segments"][row].sum())
        np.testing.assert_array_equal(rows["tokens"][row, 1:length], rows["targets"][row, : length - 1])
        np.testing.assert_array_equal(rows["positions"][row, :length], np.arange(length))


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"prompt": "Q", "completion": "A"}, "has 'prompt', 'completion'; a preference has 'chosen' and 'rejected'"),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "has the same answer twice"),
        ({"prompt": "Q", "chosen": "A", "rejected": " "}, "'completion' is empty"),
    ],
)
def test_what_is_no_preference(record, sentence):
    with pytest.raises(BadRecord, match=f"^a:1: {sentence}"):
        make_pair(record, "a:1", DataConfig())


def test_a_pair_is_not_cut(tokenizer):
    pair = make_pair(FORMS["texts"], "a:1", DataConfig())
    assert make_rows(pair, tokenizer, DataConfig(), 4)["weights"].sum() == 4
    with pytest.raises(BadRecord, match=r"a:1: takes a row of 4 and rows have 3; raise train.sequence_length"):
        make_rows(pair, tokenizer, DataConfig(), 3)
