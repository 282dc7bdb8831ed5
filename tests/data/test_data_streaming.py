"""A stream: rows made while the source is read, the same for any number of shares, and again after a resume."""

import itertools
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from gemma2_jax.config import DataConfig
from gemma2_jax.data import sources, streaming
from gemma2_jax.data.batches import Layout, eval_batches, train_batches
from gemma2_jax.data.streaming import cut_rows, fill_rows

SUMS = str(Path(__file__).parents[1] / "fixtures" / "sums.jsonl")
WORDS = "the red fox runs by seven cold hills and sings to nobody about old rivers"


@pytest.fixture
def texts(jsonl):
    """The path of 60 texts of unlike lengths, no two alike."""
    pick = random.Random(0)
    words = WORDS.split()
    return jsonl(*({"text": " ".join([str(n), *pick.choices(words, k=pick.randrange(1, 30))])} for n in range(60)))


@pytest.fixture
def opened(tokenizer, tmp_path):
    """A function that opens the batches of a stream that holds nothing out."""

    def open_batches(path, kind="text", function=train_batches, options=None, **choices):
        data = DataConfig(**{"kind": kind, "train": path, "stream": True, "eval_fraction": 0.0} | choices)
        layout = Layout(**{"sequence_length": 16, "batch_size": 4} | (options or {}))
        limit = {"max_batches": 3} if function is eval_batches else {}
        return function(data, tokenizer, layout, cache=tmp_path / "cache", **limit)

    return open_batches


def take(batches, count):
    """The arrays of so many batches, one after another."""
    taken = list(itertools.islice(batches, count))
    return {name: np.concatenate([batch[name] for batch in taken]) for name in taken[0]}


def list_documents(batches):
    """The documents of rows with one in each."""
    return {row[row > 0].tobytes() for row in batches["tokens"] if row.any()}


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def encoded_texts(path, tokenizer):
    texts = [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]
    return [[2, *tokenizer(text, add_special_tokens=False).input_ids, 1] for text in texts]


def test_texts_lie_end_to_end_in_the_order_of_the_source(opened, texts, tokenizer):
    """Token by token through two epochs and more, as nobody would write it who had to be fast."""
    length, count = 16, 60
    once = encoded_texts(texts, tokenizer)
    assert 16 * 4 * count > 2 * sum(map(len, once)), "two epochs would not be read"
    flat = [(number, token) for number, text in enumerate(once * 3) for token in text]
    got = take(opened(texts), count)
    for row in range(4 * count):
        columns = flat[row * length : (row + 1) * length]
        segment, position, previous = 0, 0, None
        for column, (number, token) in enumerate(columns):
            segment, position = (segment, position + 1) if number == previous else (segment + 1, 0)
            previous = number
            after, target = flat[row * length + column + 1]
            goes_on = after == number
            expected = (token, target if goes_on else 0, goes_on, segment, position)
            names = ("tokens", "targets", "weights", "segments", "positions")
            assert tuple(got[name][row, column] for name in names) == expected


def lay_out(rows):
    """Rows as lists of what their segments hold, tokens alone."""
    return [[segment.tokens[: segment.length].tolist() for segment in row] for row in rows]


def number_documents(*lengths):
    return [(np.full(length, number), np.ones(length, bool)) for number, length in enumerate(lengths, start=1)]


def test_a_document_goes_to_the_open_row_that_it_fills_best():
    documents = number_documents(6, 5, 4, 3, 7, 2, 8, 10, 12)

    def fill(most):
        return [[(part[0], len(part)) for part in row] for row in lay_out(fill_rows(documents, 10, most))]

    # 4 fits beside 5 too, and fills the row of 6; so does 2 that of 5 and 3. 7 and 8 are still open.
    assert fill(2) == [[(1, 6), (3, 4)], [(2, 5), (4, 3), (6, 2)], [(8, 10)], [(9, 10)]]
    assert fill(1) == [[(1, 6)], [(2, 5), (3, 4)], [(4, 3), (5, 7)], [(6, 2), (7, 8)], [(8, 10)], [(9, 10)]]
    # The oldest is closed, not the fullest.
    assert [row[0].length for row in fill_rows(number_documents(3, 8, 9, 8), 10, 2)] == [3, 8]
    assert fill(0) == [[(number, min(len(tokens), 10))] for number, (tokens, _) in enumerate(documents, start=1)]


def test_documents_are_cut_where_a_row_ends():
    assert lay_out(cut_rows(number_documents(3, 6, 2), 4)) == [[[1, 1, 1], [2]], [[2, 2, 2, 2]]]  # the third is open


def test_whole_documents_are_not_mixed(opened):
    """Each segment is a conversation of the file from its <bos> on, and every conversation comes."""
    batches = opened(SUMS, kind="instructions", options={"sequence_length": 128})
    alone = opened(SUMS, kind="instructions", packing=False, options={"sequence_length": 128})
    documents = list_documents(take(alone, 38))
    assert len(documents) > 140
    got = take(batches, 30)
    seen = set()
    for tokens, segments, positions in zip(got["tokens"], got["segments"], got["positions"], strict=True):
        for segment in range(1, segments.max() + 1):
            part = segments == segment
            assert positions[part].tolist() == list(range(part.sum()))
            seen.add(tokens[part].tobytes())
    assert seen == documents
    packed = opened(SUMS, kind="instructions", stream=False, options={"sequence_length": 128}).rows
    assert (got["segments"] > 0).mean() > 0.98 * packed.plan.tokens / (len(packed) * 128)


@pytest.mark.parametrize("choices", [{}, {"kind": "instructions", "path": SUMS}])
def test_shares_and_positions_are_of_the_same_rows(opened, texts, capsys, choices):
    """Three batches, then three more: whole, in halves, and both again from a position of the other."""

    def start(**options):
        return opened(**{"path": texts} | choices, options={"sequence_length": 64} | options)

    whole, halves = start(), [start(share_index=index, share_count=2) for index in range(2)]
    for batch, *shares in zip(itertools.islice(whole, 3), *halves, strict=False):
        same(batch, {name: np.concatenate([share[name] for share in shares]) for name in batch})
    state = json.loads(json.dumps(whole.get_state()))
    assert [half.get_state() for half in halves] == [state, state] or halves[0].get_state() == state
    expected = take(whole, 3)
    for resumed in (start(), whole):  # the latter goes back, with batches already read ahead
        resumed.set_state(state)
        assert resumed.get_state() == state
        same(take(resumed, 3), expected)
    assert "again, up to row 12, the last that the run has taken" in capsys.readouterr().err
    parts = [start(share_index=index, share_count=2) for index in range(2)]
    for part in parts:
        part.set_state(state)
    for number in range(3):
        batches = [next(part) for part in parts]
        rows = slice(4 * number, 4 * number + 4)
        same(
            {name: np.concatenate([b[name] for b in batches]) for name in expected},
            {n: a[rows] for n, a in expected.items()},
        )


def test_a_source_that_changed_before_the_position_is_refused(opened, texts):
    batches = opened(texts)
    take(batches, 3)
    state = batches.get_state()
    expected = next(batches)
    lines = Path(texts).read_text().splitlines(keepends=True)
    with open(texts, "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "more"}) + "\n")  # which was not read yet
    longer = opened(texts)
    longer.set_state(state)
    same(next(longer), expected)
    for changed in ([lines[0].replace('"0 ', '"7 '), *lines[1:]], [*lines[:2], *lines[3:]]):  # as long, or shorter
        Path(texts).write_text("".join(changed))
        with pytest.raises(ValueError, match=r"its first 12 rows are of documents of .* that are others by now"):
            opened(texts).set_state(state)
    for options in ({"batch_size": 8}, {"sequence_length": 8}):
        with pytest.raises(ValueError, match=r"rows of 16 in a stream of .*, 4 to a batch, and the data is now rows"):
            opened(texts, options=options).set_state(state)
    with pytest.raises(
        ValueError, match=r"rows of 16 in a stream of .*, 4 to a batch, and the data is now [\d,]+ rows"
    ):
        opened(texts, stream=False).set_state(state)


def test_reading_stays_close_to_training(opened, jsonl, monkeypatch):
    """Of a source without end, a few batches are read, and no more until they are taken."""
    count = itertools.count()

    def read_endlessly(data, split, piece, bound, report):
        for number in count:
            yield sources.make_example({"text": f"document {number}"}, "there", data)

    monkeypatch.setattr(sources, "read_piece", read_endlessly)
    path = jsonl({"text": "anything"})
    batches = opened(path, options={"sequence_length": 512})
    for _ in range(2):
        next(batches)
        deadline = time.monotonic() + 20
        while not all(future.done() for future in batches._batches._ahead) and time.monotonic() < deadline:
            time.sleep(0.01)
        read = next(count)
        time.sleep(0.05)
        assert next(count) == read + 1, "it reads on"
    tokens = 4 * 512 * (2 + streaming.BATCHES_AHEAD)
    assert read < tokens / 5 + 3 * 256, "a document has five tokens or more, and 256 are read at one time"


def test_bad_documents_are_counted_or_stop_the_run(opened, jsonl, capsys):
    good = [{"text": f"good {number}"} for number in range(300)]
    path = jsonl(*good[:290], {"txt": "a"}, "{", *good[290:], {"text": ""})
    skipped = opened(path, on_bad="skip")
    take(skipped, 120)
    said = capsys.readouterr().err
    assert f"1 document left out (missing column); the first is {path}:291: has no 'text'" in said
    assert f"1 document left out (not JSON); the first is {path}:292" in said
    assert f"1 document left out (empty); the first is {path}:303" in said
    assert f"{path} has ended: 300 documents are an epoch; epoch 2 begins" in said
    assert said.count("has ended") == 1, "an epoch of few documents is a line each time"
    again = opened(path, on_bad="skip")
    again.set_state(skipped.get_state())
    next(again)
    assert "left out" not in capsys.readouterr().err, "it is said again what was said before"
    clean = jsonl(*good, name="clean.jsonl")
    same(take(opened(clean), 60), take(opened(path, on_bad="skip"), 60))
    batches = opened(path, options={"sequence_length": 512})
    with pytest.raises(ValueError, match=rf"{path}:291: .*--data.on_bad skip leaves such documents out"):
        take(batches, 9)
    with pytest.raises(ValueError, match=rf"{path}:291: "):  # and not the end of a generator
        next(batches)


def test_long_documents_are_counted(opened, jsonl, capsys):
    path = jsonl(
        {"prompt": "a", "completion": "a"},
        {"prompt": "b", "completion": "b " * 50},
        {"prompt": "c " * 50, "completion": "c"},
    )
    got = take(opened(path, kind="instructions", packing=False), 1)
    assert (got["tokens"] > 0).sum(axis=1).tolist() == [4, 16, 4, 16]
    assert got["weights"].sum(axis=1).tolist() == [2, 15, 2, 15]
    said = capsys.readouterr().err
    assert "1 document: cut to 16 tokens; the first is document 2" in said
    assert "1 document left out (nothing to learn in its first 16 tokens); the first is document 3" in said
    only = jsonl({"prompt": "c " * 50, "completion": "c"}, name="only.jsonl")
    with pytest.raises(ValueError, match=r"no document of .*only.jsonl can be trained on: .*a larger train.sequence_"):
        next(opened(only, kind="instructions"))


def test_a_share_is_held_out_as_without_a_stream(opened, texts, tokenizer):
    choices = {"eval_fraction": 0.2, "packing": False, "options": {"sequence_length": 256}}
    held_out = opened(texts, function=eval_batches, **choices)
    stored = opened(texts, function=eval_batches, stream=False, **choices)
    documents = list_documents(take(held_out, 3))
    assert documents == list_documents(take(stored, 3)) and 5 < len(documents) < 13
    assert "a share of 0.2 by hash" in held_out.summary
    trained = list_documents(take(opened(texts, **choices), 30))
    assert not trained & documents and len(trained | documents) == 60
    few = opened(texts, function=eval_batches, eval_fraction=0.9, options={"sequence_length": 8, "batch_size": 2})
    assert few.rows.plan.tokens < 100, "more was read than three batches take"
    other = opened(texts, function=eval_batches, eval=SUMS, kind="instructions", options={"sequence_length": 64})
    assert "150 documents" in other.summary and "by hash" not in other.summary


def test_what_no_stream_is_made_of(opened, texts, tmp_path):
    for changes, message in (
        ({"order": "megatron"}, r"data.order megatron is for .bin and .idx files, .*; leave out data.stream"),
        ({"split_shares": "9,1"}, r"data.split_shares is for .bin and .idx files"),
        ({"path": f"0.5*{texts},0.5*b.jsonl"}, r"reads one source, and data.train names 2 \(data, b\); give one"),
        ({"path": f"{tmp_path}/web.bin"}, r"web.bin is .bin and .idx files, which hold tokens already"),
        ({"path": "tatsu-lab/alpaca"}, r"would be downloaded as a whole first; .* hf://datasets/tatsu-lab/alpaca/"),
        ({"path": f"{tmp_path}/none.jsonl"}, r"no data at '.*none.jsonl'"),
        ({"eval_fraction": 0.999999}, r"data.eval_fraction 0.999999 leaves no document of .* to train on"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(**{"path": texts} | changes)


def test_a_large_file_is_not_read_before_it_is_needed(opened, jsonl, monkeypatch):
    """Its lines are not counted, as they are to cut it into pieces."""
    from gemma2_jax.data.reading import places

    monkeypatch.setattr(places, "_cut_lines", None)
    path = jsonl(*({"text": f"{number} {'word ' * 2000}"} for number in range(1000)))
    next(opened(path, eval_fraction=0.02))
