"""Several sources in one run: their names, which row is whose, and the same rows again in any number of shares."""

import itertools
import json
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from gemma2_jax import api
from gemma2_jax.config import DataConfig
from gemma2_jax.data import mixtures
from gemma2_jax.data.batches import Layout, eval_batches, train_batches


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["data/chat.jsonl", "code/"], ["chat", "code"]),
        (["a/train.jsonl", "b/train.jsonl", "c.jsonl"], ["a/train", "b/train", "c"]),
        (["web/*.parquet", "part-*.jsonl.gz", "**/*.jsonl"], ["web", "part", "data"]),
        (["hf://org/name/data/*.parquet", "https://host/chat.jsonl?download=true"], ["data", "chat"]),
        (["openai/gsm8k", "python-docs", "x.json", "x.csv"], ["gsm8k", "python-docs", "x-1", "x-2"]),
    ],
)
def test_sources_have_short_names(places, names):
    assert mixtures.name_places(places) == names
    found = mixtures.list_sources(DataConfig(train=",".join(places)), "train")
    assert [(source.name, source.data.train) for source in found] == list(zip(names, places, strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("chat.jsonl", [("chat.jsonl", None)]),
        ("2*.jsonl", [("2*.jsonl", None)]),  # one source is a glob, whatever it begins with
        ("0.7*a.jsonl, .3*b.jsonl", [("a.jsonl", "7/10"), ("b.jsonl", "3/10")]),
        ("1 * a.jsonl,2* b/", [("a.jsonl", "1"), ("b/", "2")]),
        ("1*2*.jsonl,2*b/", [("2*.jsonl", "1"), ("b/", "2")]),
        ("part-2*.jsonl,b*.jsonl", [("part-2*.jsonl", None), ("b*.jsonl", None)]),
        ("here, there.jsonl", [("here, there.jsonl", None)]),  # a file that there is
        ("here, th*.jsonl", [("here, th*.jsonl", None)]),
    ],
)
def test_weights_are_told_from_globs(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here, there.jsonl").touch()
    found = mixtures.list_sources(DataConfig(train=text), "train")
    assert [(source.data.train, source.weight and str(source.weight)) for source in found] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "0*a,1*b"}, "data.train gives a the weight 0; give a positive one, or leave the source out"),
        ({"train": "0.7:a,0.3:b"}, "data.train is '0.7:a,0.3:b'; weights are written with \\*, as in 0.7\\*a"),
        ({"train": "1*a,b"}, "data.train gives no weight to b, and one to others; give all sources one, or none"),
        ({"train": "a,b,a"}, "data.train names a twice; name it once, with a larger weight for more of it"),
        ({"train": "1*a,2*a"}, "data.train names a twice"),
        ({"train": "nan*a,1*b"}, r"has 'nan\*a', and nan is not a weight; a weight is digits with .* as in 0.5\*a$"),
        ({"train": "50%*a,50%*b"}, r"data.train has '50%\*a', and 50% is not a weight"),
        ({"train": "1*a,-1*b"}, r"data.train has '-1\*b', and -1 is not a weight"),
        ({"train": "1e-3*a,1*b"}, r"data.train has '1e-3\*a', and 1e-3 is not a weight"),
        (
            {"train": "1/3*a,2/3*b"},
            r"and 1/3 is not a weight; .*; fractions are written as whole numbers in their prop",
        ),
        ({"train": "a,,b"}, "data.train names no source before or after one of its commas"),
        ({"train": "a,"}, "data.train names no source before or after one of its commas"),
        ({"eval": "1*a,2*b"}, "data.eval gives weights, and held-out data is read once; leave them out"),
        ({"train": "1*a,0.1234567*b"}, r"10000000:1234567 would come in turns of 11,234,567, .* round the weights"),
    ],
)
def test_what_is_no_mixture_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        mixtures.list_sources(DataConfig(**changes), "eval" if "eval" in changes else "train")


def test_a_list_is_kept_as_text():
    weighted = ["0.7*chat.jsonl", "0.3*code/"]
    assert DataConfig(train=weighted).train == "0.7*chat.jsonl,0.3*code/"
    assert api.recipe("tiny_lora", data={"train": weighted}).data.train == "0.7*chat.jsonl,0.3*code/"
    with pytest.raises(ValueError, match=r"data.eval lists 'a,b', and commas separate sources; write \? in place"):
        DataConfig(eval=["a,b", "c"])


def test_a_schedule_typed_out():
    schedule = mixtures.Schedule([Fraction("0.5"), Fraction("0.25"), Fraction("0.25")])
    assert [schedule[row] for row in range(8)] == [(0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (1, 1), (0, 3), (2, 1)]
    assert schedule[4 * 10**12] == (0, 2 * 10**12)
    assert schedule.count_rows(7) == [4, 2, 1]


def test_each_source_is_within_a_row_of_its_share():
    draw = random.Random(0)
    # Of the first, to give each row to the source that is furthest behind would leave one more than a row behind.
    cases = [[5, 1, 19, 53, 2, 53], [1] + [Fraction(1, 100)] * 50, [9973, 1], [1] * 12]
    cases += [[draw.randint(1, draw.choice([3, 60, 400])) for _ in range(draw.randint(2, 12))] for _ in range(40)]
    for weights in cases:
        schedule = mixtures.Schedule([Fraction(weight) for weight in weights])
        given = np.array([schedule.count_rows(rows) for rows in range(schedule.period + 1)])
        due = np.outer(np.arange(schedule.period + 1), [float(weight / sum(weights)) for weight in weights])
        assert np.abs(given - due).max() < 1
        turns = [schedule[row] for row in range(schedule.period)]
        assert (
            given[-1].tolist()
            == schedule.shares
            == [max(i for s, i in turns if s == n) + 1 for n in range(len(weights))]
        )
        assert len(set(turns)) == len(turns)


@pytest.fixture
def sources(jsonl):
    """Three sources of 12, 5 and 2 rows: a text of 8 tokens in each, by which the row is known."""
    return [
        jsonl(*({"text": f"{letter} {number} {number}"} for number in range(count)), name=f"{letter}.jsonl")
        for letter, count in (("a", 12), ("b", 5), ("c", 2))
    ]


def opened(sources, weights, tokenizer, tmp_path, split="train", **sizes):
    pairs = zip(weights, sources, strict=True)
    text = ",".join(f"{weight}*{source}" if weight else source for weight, source in pairs)
    data = DataConfig(kind="text", train=text, packing=False, eval_fraction=sizes.pop("eval_fraction", 0.0))
    layout = Layout(**{"sequence_length": 16, "batch_size": 4} | sizes)
    if split == "eval":
        return eval_batches(data, tokenizer, layout, cache=tmp_path / "cache", max_batches=9)
    return train_batches(data, tokenizer, layout, cache=tmp_path / "cache")


@pytest.mark.parametrize("weights", [("0.5", "0.4", "0.1"), ("", "", "")])
def test_each_source_goes_through_epochs(sources, weights, tokenizer, tmp_path):
    batches = opened(sources, weights, tokenizer, tmp_path)
    taken = [next(batches) for _ in range(38)]
    assert taken[0]["sources"].dtype == np.int32 and taken[0]["sources"].shape == (4,)
    numbers = np.concatenate([batch["sources"] for batch in taken]).tolist()
    rows = [row.tobytes() for batch in taken for row in batch["tokens"]]
    by_source = [[row for row, number in zip(rows, numbers, strict=True) if number == n] for n in range(3)]
    counts = [76, 61, 15] if weights[0] else [96, 40, 16]  # of 152 rows, which are 8 epochs of all 19
    assert np.abs(np.subtract([*map(len, by_source)], counts)).max() <= (1 if weights[0] else 0)
    epochs = {name: len(given) / size for name, given, size in zip("abc", by_source, (12, 5, 2), strict=True)}
    assert batches.count_epochs(38) == pytest.approx(epochs)
    for given, size in zip(by_source, (12, 5, 2), strict=True):
        whole = [tuple(given[start : start + size]) for start in range(0, len(given) - size + 1, size)]
        assert all(len(set(epoch)) == size for epoch in whole) or not weights[0]
        assert len(set(whole)) > 1, "every epoch is in another order"
        assert len(set(given)) == size
    assert set(by_source[0]).isdisjoint(by_source[1])


def test_position_in_a_mixture_is_restored_in_any_number_of_shares(sources, tokenizer, tmp_path):
    weights = ("0.5", "0.4", "0.1")
    batches = opened(sources, weights, tokenizer, tmp_path)
    for _ in range(5):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(7)]
    parts = [opened(sources, weights, tokenizer, tmp_path, share_index=index, share_count=2) for index in range(2)]
    for part in parts:
        part.set_state(state)
    for batch, *shares in zip(expected, *parts, strict=False):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([share[name] for share in shares]))
    message = (
        r"one in a mixture of 12 rows of 16 with \d+ tokens with weight 1/2 and 5 rows .* weight 2/5 and .*, 4 to a "
        r"batch, and the data is now a mixture of 12 rows of 16 with \d+ tokens with weight 3/5 and"
    )
    with pytest.raises(ValueError, match=message):
        opened(sources, ("0.6", "0.3", "0.1"), tokenizer, tmp_path).set_state(state)


def test_a_share_of_each_source_is_held_out(sources, tokenizer, tmp_path):
    batches = opened(sources[:2], ("0.9", "0.1"), tokenizer, tmp_path, split="eval", eval_fraction=0.4)
    trained = opened(sources[:2], ("0.9", "0.1"), tokenizer, tmp_path, eval_fraction=0.4).rows
    for number, size in enumerate((12, 5)):
        held_out = {
            batches.rows.parts[number][row]["tokens"].tobytes() for row in range(len(batches.rows.parts[number]))
        }
        kept = {trained.parts[number][row]["tokens"].tobytes() for row in range(len(trained.parts[number]))}
        assert held_out and kept and held_out.isdisjoint(kept) and len(held_out | kept) == size
    found = list(batches)
    numbers = np.concatenate([batch["sources"] for batch in found]).tolist()
    weights = np.concatenate([batch["weights"].any(axis=1) for batch in found]).tolist()
    real = list(itertools.compress(numbers, weights))
    first, second = (len(part) for part in batches.rows.parts)
    assert Counter(real) == {0: first, 1: second}
    for stop in range(len(real)):  # the first rows are of both, as the whole is
        assert abs(real[:stop].count(1) - stop * second / (first + second)) <= 1
    assert "2 sources" not in batches.summary and f"{first + second} documents" in batches.summary


def test_sources_of_a_run_are_described(sources, tokenizer, tmp_path):
    batches = opened(sources, ("0.5", "0.4", "0.1"), tokenizer, tmp_path)
    assert batches.summary == "3 sources by weight; each has epochs of its own"
    described = batches.describe_sources(10)
    assert [*described] == ["a", "b", "c"]
    assert described["b"].startswith("0.4 of the rows, 3.2 epochs in 10 steps; 5 documents (0 truncated,")
    even = opened(sources, ("", "", ""), tokenizer, tmp_path)
    assert even.summary.startswith("19 documents (0") and even.summary.endswith("an epoch is 4.8 steps")
    assert even.describe_sources(19)["c"].startswith("0.105 of the rows, 4 epochs in 19 steps; 2 documents")


def test_one_source_has_no_array_of_sources(sources, tokenizer, tmp_path):
    batches = opened(sources[:1], ("",), tokenizer, tmp_path)
    assert "sources" not in next(batches) and batches.count_epochs(9) == batches.describe_sources(9) == {}


def test_many_sources_are_longer_than_a_file_name():
    names = [f"source-{number}.jsonl" for number in range(100)]
    assert len(mixtures.list_sources(DataConfig(train=",".join(names)), "train")) == 100


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match=r"data.train is empty; name what is trained on"):
        DataConfig(train="")
