"""Megatron's order: arrays worked out by hand, loops written from the rules, and batches that plug in."""

import hashlib
import math
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma2_jax.config import DataConfig
from gemma2_jax.data.batches import Layout, eval_batches, train_batches
from gemma2_jax.data.megatron import order as megatron_order
from gemma2_jax.data.megatron.indexed import IndexedWriter, open_indexed, split_bounds
from gemma2_jax.data.megatron.order import Request, build_blend, build_order, open_rows

SMALL = ([10, 11, 1], [20, 1], [30, 31, 32, 1])  # 9 tokens: 4 samples of 2 tokens and one more
DATA = DataConfig(kind="text", order="megatron", seed=0, eval_fraction=0)


@pytest.fixture
def write(tmp_path):
    """A function that writes documents as an indexed data set, and returns its prefix."""

    def write_documents(documents, name="corpus"):
        prefix = str(tmp_path / name)
        with IndexedWriter(prefix, np.dtype("<i4"), tmp_path / "partial") as writer:
            writer.write(np.concatenate(documents).astype(int), np.array(list(map(len, documents))))
        return prefix

    return write_documents


@pytest.fixture
def ask(tmp_path):
    """A function that opens the rows of a source."""

    def open_source(source, rows, length=2, part="train", **fields):
        data = replace(DATA, train=source, **fields)
        request = Request(
            data=data, split=part, rows=rows, length=length, pad=0, vocabulary=4096, cache=tmp_path / "cache"
        )
        return open_rows(request)

    return open_source


# Of RandomState(0): the documents' order (of one epoch; of both, or of each), and the samples' order.
ONE = ([2, 1, 0], [2, 3, 0, 1])
SEPARATE = ([2, 1, 0, 2, 0, 1], [0, 2, 1, 3, 7, 4, 6, 5])
TOGETHER = ([2, 2, 1, 0, 0, 1], [1, 6, 3, 7, 0, 4, 2, 5])


@pytest.mark.parametrize(
    ("samples", "orders", "places"),
    [
        # 30 31 32 1 20 1 10 11 1: a sample begins at every second token.
        (3, ONE, [(0, 0), (0, 2), (1, 0), (2, 0), (2, 2)]),
        (4, ONE, [(0, 0), (0, 2), (1, 0), (2, 0), (2, 2)]),
        # 30 31 32 1 20 1 10 11 1 30 31 32 1 10 11 1 20 1. The second epoch gives 1 or 2 of its 4 samples: under 3.
        (5, SEPARATE, [(0, 0), (0, 2), (1, 0), (2, 0), (2, 2), (3, 1), (3, 3), (4, 1), (5, 0)]),
        (6, SEPARATE, [(0, 0), (0, 2), (1, 0), (2, 0), (2, 2), (3, 1), (3, 3), (4, 1), (5, 0)]),
        # 30 31 32 1 30 31 32 1 20 1 10 11 1 10 11 1 20 1.
        (7, TOGETHER, [(0, 0), (0, 2), (1, 0), (1, 2), (2, 0), (3, 0), (3, 2), (4, 1), (5, 0)]),
        (8, TOGETHER, [(0, 0), (0, 2), (1, 0), (1, 2), (2, 0), (3, 0), (3, 2), (4, 1), (5, 0)]),
    ],
)
def test_orders_by_hand(write, samples, orders, places):
    order = build_order(open_indexed(write(SMALL)), (0, 3), samples=samples, length=2, seed=0)
    assert (order.document_index.tolist(), order.shuffle_index.tolist()) == orders
    assert list(map(tuple, order.sample_index.tolist())) == places
    assert (order.document_index.dtype, order.sample_index.dtype, order.shuffle_index.dtype) == ("i4", "i4", "u4")


def test_rows_by_hand(write, ask):
    rows = ask(write(SMALL), 4)
    assert [row["tokens"].tolist() for row in map(rows.__getitem__, range(4))] == [[20, 1], [10, 11], [30, 31], [32, 1]]
    assert [row["targets"].tolist() for row in map(rows.__getitem__, range(4))] == [[1, 10], [11, 1], [31, 32], [1, 20]]
    row = rows[0]
    assert (row["segments"].tolist(), row["positions"].tolist(), row["weights"].tolist()) == ([1, 1], [0, 1], [1, 1])
    assert {array.dtype.name for array in row.values()} == {"int32", "float32"}


def test_padding_does_not_count(write, ask):
    """As Megatron has it: the prediction of the tokenizer's padding has no loss, wherever its number is in the data."""
    rows = ask(write([[5, 0, 6, 7]]), 1, length=3)
    assert rows[0]["tokens"].tolist() == [5, 0, 6]
    assert rows[0]["weights"].tolist() == [0, 1, 1]


def slow_samples(documents, first, last, samples, length, seed):
    """GPTDataset in loops: each sample's tokens, in the order in which they come."""
    tokens = sum(len(documents[number]) for number in range(first, last))
    epochs, have = 1, tokens
    while samples is not None and have < samples * length + 1:
        epochs, have = epochs + 1, have + tokens
    without_last = ((epochs - 1) * tokens - 1) // length
    separate = epochs > 1 and samples - without_last < int(0.80 * ((tokens - 1) // length))
    random = np.random.RandomState(seed)
    stream, parts = [], ([epochs - 1, 1] if separate else [epochs])
    for part in parts:
        numbers = np.array([number for _ in range(part) for number in range(first, last)], np.int32)
        random.shuffle(numbers)
        stream += [token for number in numbers for token in documents[number]]
    count = (epochs * tokens - 1) // length
    starts = []
    for part in [range(without_last), range(without_last, count)] if separate else [range(count)]:
        numbers = np.array(part, np.uint32)
        random.shuffle(numbers)
        starts += [int(number) * length for number in numbers]
    return [stream[start : start + length + 1] for start in starts]


def slow_blend(weights, rows):
    """build_blending_indices in loops."""
    given, choices = [0] * len(weights), []
    for row in range(rows):
        deficits = [weight * max(float(row), 1.0) - count for weight, count in zip(weights, given, strict=True)]
        chosen = deficits.index(max(deficits))
        choices.append((chosen, given[chosen]))
        given[chosen] += 1
    return choices


def corpus(seed, documents):
    random = np.random.RandomState(seed)
    return [random.randint(3, 4096, size) for size in random.randint(0, 60, documents)]


def texts(rows):
    return [[*row["tokens"].tolist(), int(row["targets"][-1])] for row in map(rows.__getitem__, range(len(rows)))]


@pytest.mark.parametrize("documents", [1, 5, 40])
@pytest.mark.parametrize("samples", [1, 30, 31, 33, 200, 1000])
@pytest.mark.parametrize("seed", [0, 1234])
def test_rows_are_those_of_the_loops(write, ask, documents, samples, seed):
    made = corpus(documents, documents)
    rows = ask(write(made), samples, length=16, seed=seed)
    assert len(rows) >= samples
    assert texts(rows) == slow_samples(made, 0, documents, samples, 16, seed)


@pytest.mark.parametrize(
    "weights",
    [[0.7, 0.3], [1.0], [1 / 3] * 3, [0.25] * 4, [0.9, 0.05, 0.05], [0.999, 0.001]]
    + [np.random.RandomState(count).dirichlet(np.ones(count)).tolist() for count in (2, 3, 8, 30)],
)
@pytest.mark.parametrize("rows", [1, 9, 4000])
def test_blends_are_those_of_the_loops(monkeypatch, weights, rows):
    monkeypatch.setattr(megatron_order, "_WARMUP", 2)  # so that some runs begin from wrong guesses
    monkeypatch.setattr(megatron_order, "_LANES", 50)
    blend = build_blend(weights, rows)
    pairs = np.stack([blend.dataset_index, blend.dataset_sample_index], axis=1)
    np.testing.assert_array_equal(pairs, slow_blend(weights, rows))


def test_blends_are_asked_for_half_a_percent_more(write, ask):
    made = [corpus(seed, 30) for seed in (1, 2)]
    sizes = [math.ceil(math.ceil(1001 * weight) * 1.005) for weight in (0.7, 0.3)]  # 705 and 303
    prefixes = [write(documents, name) for documents, name in zip(made, "ab", strict=True)]
    rows = ask(f"7*{prefixes[0]},3*{prefixes[1]}.bin", 1001, length=8)
    samples = [slow_samples(documents, 0, 30, size, 8, 0) for documents, size in zip(made, sizes, strict=True)]
    expected = [samples[number][sample] for number, sample in slow_blend([0.7, 0.3], math.ceil(700.7) + 301)]
    assert texts(rows) == expected


def test_without_weights_each_is_read_once(write, ask):
    made = [corpus(1, 30), corpus(2, 9)]
    source = ",".join(write(documents, name) for documents, name in zip(made, "ab", strict=True))
    samples = [slow_samples(documents, 0, len(documents), None, 8, 0) for documents in made]
    count = sum(map(len, samples))
    chosen = slow_blend([len(part) / count for part in samples], count)
    assert texts(ask(source, count, length=8)) == [samples[number][sample] for number, sample in chosen]
    with pytest.raises(ValueError, match=f"has {count} rows of 8 tokens, and the run takes {count + 1}; give weights"):
        ask(source, count + 1, length=8)


@pytest.mark.parametrize(
    ("train", "held_out", "samples", "trained", "evaluated"),
    [
        ("{a}", "", (250, 30), "265 0bab2a2d8c35560a", "47 51ff9d2d4f2c52cb"),
        ("0.7*{a},0.3*{b}", "", (400, 60), "400 fb1d62374dc13e90", "60 d3a38fd16e4fa5ce"),
        ("{a},{b}", "", (100, 20), "100 675a3bee61ee38f1", "20 fc6688f857155e83"),
        ("1*{a},3*{b}", "{b}", (400, 100), "400 e64fab96ef33ea72", "144 ada7e492436ca291"),
    ],
)
def test_rows_are_those_of_megatron_core(write, ask, train, held_out, samples, trained, evaluated):
    """Digests of what BlendedMegatronDatasetBuilder of megatron-core 0.19.2 gave for these documents and seed 1234."""
    names = {"a": write(corpus(1, 60), "a"), "b": write(corpus(2, 40), "b")}
    fields = {"eval": held_out.format(**names)} if held_out else {"split_shares": "80,20,0"}
    for part, count, expected in zip(("train", "eval"), samples, (trained, evaluated), strict=True):
        rows = ask(train.format(**names), count, length=16, part=part, seed=1234, **fields)
        digest = hashlib.blake2b(digest_size=8)
        for row in map(rows.__getitem__, range(len(rows))):
            digest.update(row["tokens"].tobytes() + row["targets"].tobytes())
        assert f"{len(rows)} {digest.hexdigest()}" == expected


def test_a_row_may_take_several_epochs(write, ask):
    assert texts(ask(write([[20, 1]]), 3, length=5)) == slow_samples([[20, 1]], 0, 1, 3, 5, 0)


@pytest.mark.parametrize(
    ("split", "count", "bounds"),
    [
        ((9999, 8, 2), 10_009, [(0, 9999), (9999, 10_007), (10_007, 10_009)]),
        ((9999, 8, 2), 1000, [(0, 999), (999, 1000), (1000, 1000)]),
        ((969, 30, 1), 10, [(0, 10), (10, 10), (10, 10)]),
        ((1, 1, 0), 5, [(0, 2), (2, 5), (5, 5)]),  # halves are rounded to even numbers
        ((0.98, 0.02, 0), 100, [(0, 98), (98, 100), (100, 100)]),
    ],
)
def test_splits(split, count, bounds):
    assert split_bounds(split, count) == bounds


def test_held_out_documents_are_another_part(write, ask):
    made = corpus(3, 50)
    prefix = write(made)
    for split, (first, last) in {"train": (0, 40), "eval": (40, 45)}.items():
        rows = ask(prefix, 70, length=8, part=split, split_shares="80,10,10")
        assert texts(rows) == slow_samples(made, first, last, 70, 8, 0)


def test_a_source_of_its_own_is_held_out_whole(write, ask):
    made = [corpus(3, 20), corpus(4, 20)]
    prefixes = [write(documents, name) for documents, name in zip(made, "ab", strict=True)]
    for split, documents in zip(("train", "eval"), made, strict=True):
        rows = ask(prefixes[0], 70, length=8, part=split, eval=prefixes[1])
        assert texts(rows) == slow_samples(documents, 0, 20, 70, 8, 0)


@pytest.mark.parametrize(
    ("source", "fields", "reason"),
    [
        ("{a},{b}.jsonl", {}, r"there is no .*b.jsonl.bin with .*b.jsonl.idx; make them of any source with"),
        ("0.5*{a},{b}", {}, r"gives weights to 1 of its 2 data sets; give all or none"),
        ("x*{a}", {}, r"'x' in x\*.*a is no weight; it must be a positive number, as in 0.7\*a,0.3\*b"),
        ("0*{a},1*{b}", {}, "'0' in .* is no weight"),
        (
            "{a}",
            {"part": "eval"},
            r"shares of 1, 0, 0 leave none of the 3 documents of .*a held out; give others",
        ),
        ("{a}", {"kind": "instructions"}, r"a.bin has tokens and not which of them answer a prompt; --data.kind text"),
        ("{a},{b}", {"length": 9}, r"a has 9 tokens in its documents 0 to 3, and a row takes 10"),
    ],
)
def test_what_has_no_rows_is_told(write, ask, source, fields, reason):
    names = {name: write(SMALL, name) for name in "ab"}
    with pytest.raises(ValueError, match=reason):
        ask(source.format(**names), 4, **fields)


def test_a_token_of_another_tokenizer_is_an_error(write, ask):
    rows = ask(write([[5, 4096, 6]]), 1)
    with pytest.raises(
        ValueError, match=r"corpus\.bin has token 4096, and the tokenizer has 4,096; it was written with"
    ):
        rows[0]


@pytest.fixture
def made(tokenizer, write, tmp_path):
    """A function that makes batches of 4 rows of a blend."""
    source = ",".join(f"{weight}*{write(corpus(weight, 60), f'set{weight}')}" for weight in (7, 3))
    data = replace(DATA, train=source, split_shares="80,20")

    def make(function=train_batches, **options):
        sizes = {name: options.pop(name) for name in ("share_index", "share_count") if name in options}
        layout = Layout(sequence_length=16, batch_size=4, **sizes)
        return function(data, tokenizer, layout, cache=tmp_path / "cache", **options)

    return make


def test_batches_are_the_rows_as_they_come(made):
    batches = made(steps=40)
    for step, batch in zip(range(40), batches, strict=False):
        for number in range(4):
            for name, array in batches.rows[4 * step + number].items():
                np.testing.assert_array_equal(batch[name][number], array)
    assert re.fullmatch(
        r"160 rows of 16 in Megatron's order, .*: 112 of .*set7, 48 of .*set3; 40.0 steps", batches.summary
    )


def test_a_run_goes_on_with_another_number_of_shares(made):
    batches = made(steps=40)
    expected = [batch["tokens"] for batch, _ in zip(batches, range(40), strict=False)]
    half = [made(steps=40, share_index=index, share_count=2) for index in range(2)]
    first = [[next(share)["tokens"] for share in half] for _ in range(7)]
    whole = made(steps=40)
    whole.set_state(half[1].get_state())
    np.testing.assert_array_equal(
        np.concatenate([np.concatenate(pair) for pair in first]), np.concatenate(expected[:7])
    )
    np.testing.assert_array_equal([next(whole)["tokens"] for _ in range(33)], expected[7:])


def test_more_steps_may_be_another_order(made):
    """Where they need no further epoch, the order is the same, and a longer run goes on in it."""
    state = made(steps=40).get_state()
    made(steps=41).set_state(state)
    with pytest.raises(ValueError, match=r"rows of 16 in Megatron's order .* \(which depends on steps\)"):
        made(steps=400).set_state(state)


def test_evaluations_read_the_first_batches(made):
    """Megatron reads on in each evaluation, and asks for as many samples: the first of them are read here each time."""
    batches = made(eval_batches, max_batches=3, evaluations=5)
    assert len(batches.rows) == math.ceil(60 * 0.7) + math.ceil(60 * 0.3)
    assert len(batches) == 3
    np.testing.assert_array_equal(batches[2]["tokens"][3], batches.rows[11]["tokens"])


def test_what_was_made_is_read_again(write, ask, monkeypatch):
    source = f"7*{write(SMALL, 'a')},3*{write(SMALL, 'b')}"
    before = texts(ask(source, 50))
    for name in ("build_order", "build_blend"):
        monkeypatch.delattr(megatron_order, name)
    rows = ask(source, 50)
    assert texts(rows) == before
    assert isinstance(rows.orders[0].sample_index, np.memmap)


def test_what_a_killed_process_made_is_made_again(write, ask, tmp_path, monkeypatch):
    prefix = write(SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            ask(prefix, 4)
    assert [path.suffix for path in sorted((tmp_path / "cache").iterdir())] == [".lock", ".partial"]
    ask(prefix, 4)
    assert [path.suffix for path in sorted((tmp_path / "cache").iterdir())] == ["", ".lock"]


def test_what_cannot_be_kept_or_read_is_told(write, ask, tmp_path):
    prefix = write(SMALL)
    ask(prefix, 4)
    (array,) = (tmp_path / "cache").rglob("sample_index.npy")
    array.write_bytes(array.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=rf"the order of rows in {array.parent} is damaged .*; delete it, and it is made"
    ):
        ask(prefix, 4)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    with pytest.raises(OSError, match=r"the order of rows could not be written to .*cache .*; make room there"):
        ask(prefix, 4)
