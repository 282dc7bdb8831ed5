"""Rows, typed out: which document goes where, what is predicted from what, and what is cut off."""

import numpy as np
import pytest

from gemma2_jax.data import packing
from gemma2_jax.data.encoding import Store

SEED = 0  # RandomState(0).permutation(3) is [2, 1, 0], which never changes


def store(*documents, prompt=1):
    """Documents of which all but the first `prompt` tokens are learned."""
    tokens = np.concatenate(documents).astype(np.int32)
    learned = np.concatenate([np.arange(len(document)) >= prompt for document in documents])
    return Store(tokens=tokens, learned=learned, offsets=np.cumsum([0, *map(len, documents)]))


def arrays(rows):
    """All rows' arrays as lists, by name, and a check of what they are."""
    found = {name: [] for name in packing.empty_batch(1)}
    for row in (rows[index] for index in range(len(rows))):
        for name, array in row.items():
            assert array.shape == (rows.length,)
            assert array.dtype == (np.float32 if name == "weights" else np.int32)
            found[name].append(array.tolist())
    assert sum(map(sum, found["weights"])) == rows.targets
    return found


def test_texts_are_cut_where_a_row_ends():
    documents = store([2, 30, 31, 32, 1], [2, 20, 1], [2, 10, 1])
    rows = packing.pack_documents(documents, length=4, packing=True, concatenate=True, seed=SEED)
    assert arrays(rows) == {
        # In line: 2 10 1 | 2 20 1 | 2 30 31 32 1. The last 1 is but a target.
        "tokens": [[2, 10, 1, 2], [20, 1, 2, 30], [31, 32, 1, 0]],
        "targets": [[10, 1, 0, 20], [1, 0, 30, 31], [32, 1, 0, 0]],
        "segments": [[1, 1, 1, 2], [1, 1, 2, 2], [1, 1, 1, 0]],
        "positions": [[0, 1, 2, 0], [0, 1, 0, 1], [0, 1, 2, 0]],
        "weights": [[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 0, 0]],
    }
    assert (rows.documents, rows.tokens, rows.truncated, rows.dropped) == (3, 11, 0, 0)


def test_a_last_token_does_not_get_a_row_of_its_own():
    rows = packing.pack_documents(store([2, 10, 11, 12, 1]), length=4, packing=True, concatenate=True, seed=SEED)
    assert arrays(rows)["tokens"] == [[2, 10, 11, 12]]
    assert arrays(rows)["targets"] == [[10, 11, 12, 1]]
    assert arrays(rows)["weights"] == [[1, 1, 1, 1]]


def test_a_text_may_fill_several_rows():
    rows = packing.pack_documents(
        store([2, 10, 11, 12, 13, 14, 1]), length=2, packing=True, concatenate=True, seed=SEED
    )
    assert arrays(rows)["tokens"] == [[2, 10], [11, 12], [13, 14]]
    assert arrays(rows)["targets"] == [[10, 11], [12, 13], [14, 1]]


def test_whole_documents_share_rows():
    documents = store([2, 30, 31, 32, 1], [2, 20, 21, 1], [2, 10, 1], prompt=2)
    rows = packing.pack_documents(documents, length=8, packing=True, concatenate=False, seed=SEED)
    assert arrays(rows) == {
        "tokens": [[2, 10, 1, 2, 20, 21, 1, 0], [2, 30, 31, 32, 1, 0, 0, 0]],
        "targets": [[10, 1, 0, 20, 21, 1, 0, 0], [30, 31, 32, 1, 0, 0, 0, 0]],
        "segments": [[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0, 0]],
        "positions": [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 0, 0]],
        "weights": [[0, 1, 0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0]],
    }
    assert (rows.documents, rows.tokens, rows.truncated, rows.dropped) == (3, 12, 0, 0)


def test_without_packing_each_document_has_a_row():
    documents = store([2, 30, 31, 32, 1], [2, 20, 1], [2, 10, 1])
    rows = packing.pack_documents(documents, length=6, packing=False, concatenate=True, seed=SEED)
    assert arrays(rows)["tokens"] == [[2, 10, 1, 0, 0, 0], [2, 20, 1, 0, 0, 0], [2, 30, 31, 32, 1, 0]]
    assert arrays(rows)["segments"] == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert arrays(rows)["weights"] == [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize("packed", [True, False])
def test_what_does_not_fit_is_counted(packed):
    # In line: one that fits, one cut within what is learned, one cut before it.
    documents = store([2, 30, 31, 32, 33, 34, 1], [2, 20, 21, 22, 23, 1], [2, 1], prompt=1)
    documents.learned[1:5] = False
    rows = packing.pack_documents(documents, length=4, packing=packed, concatenate=False, seed=SEED)
    assert arrays(rows)["tokens"] == [[2, 1, 0, 0], [2, 20, 21, 22]]
    assert arrays(rows)["targets"] == [[1, 0, 0, 0], [20, 21, 22, 23]]  # cut off as an input, not as a target
    assert arrays(rows)["weights"] == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert (rows.documents, rows.truncated, rows.dropped) == (2, 1, 1)


def test_all_documents_too_long_is_an_error():
    with pytest.raises(ValueError, match=r"begin after the first 2; raise train.sequence_length"):
        packing.pack_documents(
            store([2, 30, 31, 32, 1], prompt=3), length=2, packing=True, concatenate=False, seed=SEED
        )


def test_best_fit_fills_the_fullest_row_that_has_room(monkeypatch):
    lengths = np.array([6, 5, 5, 4, 3, 2, 10, 1])
    # Rows by what they hold: 6 4 | 5 5 | 3 2 1 | 10
    assert packing.plan_rows(lengths, 10).tolist() == [0, 1, 1, 0, 2, 2, 3, 2]
    monkeypatch.setattr(packing, "_OPEN_ROWS", 1)  # 6 is closed when 5 opens a row, 5 5 is full: 6 | 5 5 | 4 3 2 1
    assert packing.plan_rows(lengths, 10).tolist() == [0, 1, 1, 2, 2, 2, 3, 2]


@pytest.mark.parametrize("concatenate", [True, False])
def test_many_documents_keep_every_target(concatenate):
    draw = np.random.RandomState(1)
    documents = [np.r_[2, draw.randint(3, 99, draw.randint(1, 30)), 1] for _ in range(500)]
    rows = packing.pack_documents(store(*documents), length=32, packing=True, concatenate=concatenate, seed=1)
    found = arrays(rows)
    assert rows.targets == sum(len(document) - 1 for document in documents)
    assert rows.tokens / (len(rows) * rows.length) > 0.94
    learned = sorted(
        t for ts, ws in zip(found["targets"], found["weights"], strict=True) for t, w in zip(ts, ws, strict=True) if w
    )
    assert learned == sorted(token for document in documents for token in document[1:].tolist())
