"""Batches: the same rows for any number of shares, and the same again from a saved position."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma2_jax.config import DataConfig
from gemma2_jax.data.batches import Layout, eval_batches, train_batches

TINY = Path(__file__).parents[2] / "assets" / "tiny-gemma2"
DOCS = DataConfig()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def made(tokenizer, cache):
    """A function that makes batches of python_docs' instructions."""

    def make(function=train_batches, data=DOCS, max_batches=9, **sizes):
        layout = Layout(**{"sequence_length": 256, "batch_size": 4} | sizes)
        limit = {"max_batches": max_batches} if function is eval_batches else {}
        return function(data, tokenizer, layout, cache=cache, **limit)

    return make


def digest(batches, count):
    together = hashlib.blake2b()
    for _, batch in zip(range(count), batches, strict=False):
        for array in batch.values():
            together.update(array.tobytes())
    return together.hexdigest()


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def test_batches_are_of_the_promised_shapes(made):
    batch = next(made())
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "tokens": ((4, 256), np.int32),
        "targets": ((4, 256), np.int32),
        "segments": ((4, 256), np.int32),
        "positions": ((4, 256), np.int32),
        "weights": ((4, 256), np.float32),
    }


@pytest.mark.parametrize("make", [train_batches, eval_batches])
@pytest.mark.parametrize("count", [2, 4])
def test_shares_are_of_each_batch_in_order(made, make, count):
    whole = made(make, max_batches=3)
    parts = [made(make, max_batches=3, share_index=index, share_count=count) for index in range(count)]
    for _, batch, *shares in zip(range(3), whole, *parts, strict=False):
        same(batch, {name: np.concatenate([share[name] for share in shares]) for name in batch})


def test_a_batch_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"a batch of 4 rows does not divide into 3 shares; use 6"):
        Layout(sequence_length=256, batch_size=4, share_count=3)


def test_every_epoch_has_every_row_in_another_order(made):
    batches = made(batch_size=1)
    epochs = []
    for _ in range(2):
        rows = [next(batches)["tokens"].tobytes() for _ in range(len(batches.rows))]
        assert sorted(rows) == sorted(batches.rows[index]["tokens"].tobytes() for index in range(len(rows)))
        epochs.append(rows)
    assert epochs[0] != epochs[1]


def test_seed_decides_the_order(made):
    first, again, other = (next(made(data=DataConfig(seed=seed)))["tokens"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_position_is_restored_in_any_number_of_shares(made):
    batches = made()
    for _ in range(3):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(3)]
    batches.set_state(state)  # back, with batches already read ahead
    part = made(share_index=1, share_count=2)
    part.set_state(state)
    assert part.get_state() == state
    for batch in expected:
        same(next(batches), batch)
        same(next(part), {name: array[2:] for name, array in batch.items()})


def test_position_in_other_data_is_an_error(made):
    unpacked = DataConfig(packing=False)  # as many rows, however long
    state = made(data=unpacked).get_state()
    position = r"5,\d{3} rows of 256 with \d{3},\d{3} tokens, 4 to a batch"
    for choices, change in (
        ({"batch_size": 8}, "256 with .*, 8 to a batch"),
        ({"sequence_length": 128}, "128 with .*, 4 to a batch"),
        ({"data": DOCS}, "256 with .*, 4 to a batch"),
    ):
        message = rf"its position is one in {position}, and the data is now [\d,]+ rows of {change}"
        with pytest.raises(ValueError, match=message):
            made(**{"data": unpacked} | choices).set_state(state)


def test_another_python_process_sees_the_same(made, tmp_path):
    batches = made()
    next(batches)
    state = batches.get_state()
    script = (
        "import sys\n"
        "from test_data_batches import *\n"
        "from gemma2_jax.data.batches import load_tokenizer\n"
        "layout = Layout(sequence_length=256, batch_size=4)\n"
        "batches = train_batches(DOCS, load_tokenizer(str(TINY)), layout, cache=Path('.'))\n"
        "assert not {'this', 'turtle', 'tkinter'} & sys.modules.keys()  # read, not imported\n"
        f"batches.set_state({state!r})\n"
        "print(digest(batches, 5))\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(TINY.parents[1])])
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [digest(batches, 5)]


def test_few_rows_are_repeated_within_a_batch(made, jsonl):
    path = jsonl({"text": "a"}, {"text": "b"}, {"text": "c"})
    data = DataConfig(kind="text", train=path, eval=path, packing=False)
    batches = made(data=data, batch_size=7)
    rows = [row.tobytes() for row in next(batches)["tokens"]]
    assert sorted(map(rows.count, set(rows))) in ([2, 2, 3],)
    assert batches.summary.endswith("an epoch is 0.4 steps")


def test_evaluation_is_finite_and_ends_in_padding(made, jsonl):
    path = jsonl(*({"text": text} for text in "abcde"))
    data = DataConfig(kind="text", train=path, eval=path, packing=False)
    batches = made(eval_batches, data=data, max_batches=9)
    assert len(batches) == 2
    first, again = list(batches), list(batches)
    for left, right in zip(first, again, strict=True):
        same(left, right)
    assert [batch["weights"].any(axis=1).tolist() for batch in first] == [[True] * 4, [True, False, False, False]]
    assert not any(array[1:].any() for array in first[1].values())
    assert len(list(made(eval_batches, data=data, max_batches=1))) == 1
    last = made(eval_batches, data=data, max_batches=9, share_index=1, share_count=2)
    assert not last[1]["weights"].any()


def test_summary_reports_what_was_cut(made, jsonl):
    path = jsonl(
        {"prompt": "a", "completion": "a"},
        {"prompt": "b", "completion": "b " * 50},
        {"prompt": "c " * 50, "completion": "c"},
    )
    batches = made(data=DataConfig(train=path, eval=path), sequence_length=16)
    assert batches.summary == (
        "2 documents (1 truncated, 1 more dropped for length), 20 tokens (85% count in the loss), "
        "2 rows of 16 (62.5% full); an epoch is 0.5 steps"
    )
