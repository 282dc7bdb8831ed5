"""Rows, typed out: which document goes where, what is predicted from what, and what is cut off."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma2_jax.data import packing
from gemma2_jax.data.store import Store

SEED = 0  # RandomState(0) permutes 3 documents to [2, 1, 0] and then 2 rows to [0, 1], which never changes


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
    assert sum(map(sum, found["weights"])) == rows.plan.targets
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
    assert (rows.plan.documents, rows.plan.tokens, rows.plan.truncated, rows.plan.dropped) == (3, 11, 0, 0)


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
    assert arrays(rows) == {  # the longest first, and what fills its row
        "tokens": [[2, 30, 31, 32, 1, 2, 10, 1], [2, 20, 21, 1, 0, 0, 0, 0]],
        "targets": [[30, 31, 32, 1, 0, 10, 1, 0], [20, 21, 1, 0, 0, 0, 0, 0]],
        "segments": [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0, 0, 0]],
        "positions": [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 0, 0, 0]],
        "weights": [[0, 1, 1, 1, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0]],
    }
    assert (rows.plan.documents, rows.plan.tokens, rows.plan.truncated, rows.plan.dropped) == (3, 12, 0, 0)


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
    whole, cut = [1, 0] if packed else [0, 1]  # the longest document is packed first
    found = arrays(rows)
    assert (found["tokens"][whole], found["tokens"][cut]) == ([2, 1, 0, 0], [2, 20, 21, 22])
    assert (found["targets"][whole], found["targets"][cut]) == ([1, 0, 0, 0], [20, 21, 22, 23])  # 23 is but a target
    assert (found["weights"][whole], found["weights"][cut]) == ([1, 0, 0, 0], [1, 1, 1, 1])
    assert (rows.plan.documents, rows.plan.truncated, rows.plan.dropped) == (2, 1, 1)


def test_all_documents_too_long_is_an_error():
    with pytest.raises(ValueError, match=r"begin after the first 2; raise train.sequence_length"):
        packing.pack_documents(
            store([2, 30, 31, 32, 1], prompt=3), length=2, packing=True, concatenate=False, seed=SEED
        )


@pytest.mark.parametrize(
    ("lengths", "placements"),
    [
        # Rows by what they hold: 10 | 6 4 | 5 5 | 3 2 1
        ([6, 5, 5, 4, 3, 2, 10, 1], [(1, 0, 1), (1, 1, 1), (2, 2, 1), (1, 1, 1), (1, 3, 1), (1, 3, 1), (1, 3, 1)]),
        # 7 3 | 7 3 | 7 3 | 7 3 | 3 1
        ([3, 3, 3, 3, 3, 7, 7, 7, 7, 1], [(1, 0, 4), (1, 0, 4), (1, 4, 1), (1, 4, 1)]),
        # 8 | 8 | 3 3 3 | 3 3 3 | 3 and of the short ones 2 | 2 to the fullest that have room, then 2 2 2 to the last
        ([8, 8, *[3] * 7, *[2] * 5], [(1, 0, 2), (3, 2, 2), (1, 4, 1), (1, 0, 2), (3, 4, 1)]),
        # 4 4 | 4 4 | 4 3 3: of rows with as much room, those of the last kind are filled first
        ([4] * 5 + [3] * 2, [(2, 0, 2), (1, 2, 1), (2, 2, 1)]),
    ],
)
def test_each_document_goes_where_it_leaves_least(lengths, placements):
    counts = np.bincount(lengths, minlength=11)
    assert packing.plan_rows(counts, 10).tolist() == [list(placement) for placement in placements]


def test_documents_of_one_length_are_shuffled():
    # RandomState(0) permutes 8 documents to 6 2 1 7 3 0 5 4: those of 3 tokens are 6 2 7 0 4, of 2 tokens 1 3 5.
    documents = store(*([2, 10 + number, 1][: 2 + (number not in (1, 3, 5))] for number in range(8)))
    rows = packing.pack_documents(documents, length=6, packing=True, concatenate=False, seed=SEED)
    # Two by two into rows 0 1 2, and of the short ones 1 after the 4, and 3 5 into row 3. 4 rows permute to 3 0 2 1.
    assert rows.plan.order.tolist() == [7, 0, 3, 5, 4, 1, 6, 2]
    assert rows.plan.bounds.tolist() == [0, 2, 4, 6, 8]


def test_rows_are_not_in_the_order_of_lengths():
    """The longest documents are planned first; evaluation reads the first rows, and may not find only those there."""
    lengths = np.repeat([30, 20], 100)
    order, bounds = packing.assign_rows(lengths, 32, np.random.RandomState(0))
    assert bounds.tolist() == list(range(201))
    assert 35 < np.count_nonzero(lengths[order[:100]] == 30) < 65


@pytest.mark.parametrize("concatenate", [True, False])
def test_many_documents_keep_every_target(concatenate):
    draw = np.random.RandomState(1)
    documents = [np.r_[2, draw.randint(3, 99, draw.randint(1, 30)), 1] for _ in range(500)]
    rows = packing.pack_documents(store(*documents), length=32, packing=True, concatenate=concatenate, seed=1)
    found = arrays(rows)
    assert rows.plan.targets == sum(len(document) - 1 for document in documents)
    assert rows.plan.tokens / (len(rows) * rows.length) > 0.96
    learned = sorted(
        t for ts, ws in zip(found["targets"], found["weights"], strict=True) for t, w in zip(ts, ws, strict=True) if w
    )
    assert learned == sorted(token for document in documents for token in document[1:].tolist())


LEARNED = np.random.RandomState(2).rand(1000) < 0.3


@pytest.mark.parametrize("block", [1, 7, 1000, 4096])
def test_learned_tokens_are_counted_in_blocks(block, monkeypatch):
    monkeypatch.setattr(packing, "_BLOCK_TOKENS", block)
    positions = np.array([0, 0, 1, 6, 7, 8, 500, 500, 999, 1000])
    counts, total = packing.count_learned(LEARNED, positions)
    assert counts.tolist() == [LEARNED[:position].sum() for position in positions]
    assert total == LEARNED.sum()


def test_more_learned_tokens_than_32_bits_count():
    block = np.ones(packing._BLOCK_TOKENS, bool)

    class Everything:
        def __len__(self):
            return (1 << 31) + 10

        def __getitem__(self, part):
            return block[: min(part.stop, len(self)) - part.start]

    positions = np.array([5, (1 << 31) + 5])
    counts, total = packing.count_learned(Everything(), positions)
    assert counts.tolist() == positions.tolist() and total == (1 << 31) + 10


@pytest.mark.parametrize(("packed", "concatenate"), [(True, True), (True, False), (False, False)])
def test_a_plan_is_kept_beside_the_tokens(packed, concatenate, tmp_path, monkeypatch, caplog):
    documents = store([2, 30, 31, 32, 1], [2, 20, 21, 1], [2, 10, 1])
    choices = {"length": 4, "packing": packed, "concatenate": concatenate, "seed": SEED}
    expected = arrays(packing.pack_documents(documents, **choices))
    documents = replace(documents, folder=tmp_path)
    assert arrays(packing.pack_documents(documents, **choices)) == expected
    (path,) = tmp_path.iterdir()
    planned, whole = [], path.read_bytes()
    for name in ("plan_cuts", "plan_whole_documents"):
        make = getattr(packing, name)
        monkeypatch.setattr(packing, name, lambda *a, make=make, **k: planned.append(1) or make(*a, **k))
    rows = packing.pack_documents(documents, **choices)
    assert arrays(rows) == expected and not planned and isinstance(rows.plan.order.base, np.memmap)
    for damaged in (b"", whole[:100], whole[:-8], whole[:-48] + bytes(48), b"x" * len(whole)):
        path.write_bytes(damaged)
        planned.clear()
        assert arrays(packing.pack_documents(documents, **choices)) == expected
        assert planned and path.read_bytes() == whole
        assert f"the plan of rows in {path} is damaged (" in caplog.messages.pop()
    for other in ({"length": 5}, {"seed": 1}, {"packing": not packed}):
        packing.pack_documents(documents, **choices | other)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_plan_that_cannot_be_written_is_used_as_it_is(tmp_path, caplog):
    """As of a cache that this user may only read."""
    documents = store([2, 10, 1])
    choices = dict(length=4, packing=True, concatenate=True, seed=SEED)
    rows = packing.pack_documents(replace(documents, folder=tmp_path / "none"), **choices)
    assert arrays(rows) == arrays(packing.pack_documents(documents, **choices))
    assert "none/plan-1-cut-4-0.npy (" in caplog.text


def test_a_plan_that_was_killed_leaves_nothing(tmp_path, monkeypatch):
    documents = replace(store([2, 10, 1]), folder=tmp_path / "store")
    documents.folder.mkdir()
    choices = dict(length=4, packing=True, concatenate=True, seed=SEED)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            packing.pack_documents(documents, **choices)
    packing.pack_documents(documents, **choices)
    assert [path.name for path in documents.folder.iterdir()] == ["plan-1-cut-4-0.npy"]
