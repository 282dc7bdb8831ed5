"""What sentences on data quote: names and values of any length, and plain words for what a record holds."""

import json

import pytest

from gemma2_jax.config import DataConfig
from gemma2_jax.data import wording
from gemma2_jax.data.encoding import encode_examples
from gemma2_jax.data.reading import places
from gemma2_jax.data.records import BadRecord, make_example
from gemma2_jax.data.report import Report

LONG = "x" * 1_000_000
USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def test_a_long_text_keeps_its_ends():
    text = wording.shorten("a" * 50 + "b" * 50, 60)
    assert text == "a" * 40 + "..." + "b" * 17 and len(text) == 60
    assert wording.shorten(text, 60) == text
    assert wording.quote("it") == "'it'" and len(wording.quote("\n" * 99)) == 60


def test_a_list_names_the_first_and_counts_the_rest():
    assert wording.quote_list("ab") == "'a', 'b'" and wording.quote_list([]) == ""
    assert wording.quote_list(range(5_010)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 5,000 more"


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "null"), (True, "true or false"), (7, "a number"), (0.5, "a number"), ("a", "a text"), ([], "a list")],
)
def test_what_is_no_record_is_called_by_plain_words(value, said):
    with pytest.raises(BadRecord, match=f"a:1: holds {said}; a document is a JSON object"):
        make_example(value, "a:1", DataConfig(train="a"))


@pytest.mark.parametrize(
    ("record", "choices"),
    [
        ({str(number): "text" for number in range(5_000)}, {}),
        ({LONG: "text"}, {}),
        ({LONG: [USER, ANSWER]}, {}),
        ({LONG: "text"}, {"kind": "text"}),
        ({LONG: "text"}, {"columns": "prompt=q"}),
        ({LONG: "text", "prompt": "Q"}, {"columns": "prompt=prompt"}),
        ({"messages": [{"role": LONG, "content": "Q"}]}, {}),
        ({"messages": [{LONG: "Q"}]}, {}),
        ({"messages": [{"role": "user", "content": [{"type": LONG}]}]}, {}),
        ({"messages": [USER, ANSWER | {"weight": LONG}]}, {}),
        ({LONG: "text"}, {"prompt_template": "{q}"}),
    ],
)
def test_what_is_long_is_shortened(record, choices):
    with pytest.raises(BadRecord) as raised:
        make_example(record, "a:1", DataConfig(train="a", **choices))
    assert len(str(raised.value)) < 1000


def test_a_column_that_no_option_can_name_is_to_be_renamed():
    with pytest.raises(BadRecord, match="rename the column that holds its text to 'text'"):
        make_example({"a=b": "text"}, "a:1", DataConfig(train="a"))


def test_what_a_template_says_is_shortened(tokenizer, monkeypatch):
    template = "{% for message in messages %}{{ raise_exception(message['content']) }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    example = make_example({"messages": [USER | {"content": LONG}, ANSWER]}, "a:1", DataConfig(train="a"))
    with pytest.raises(ValueError, match="does not take these messages: x") as raised:
        list(encode_examples([example], tokenizer, DataConfig(train="a"), Report()))
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", f"{LONG},{LONG}\n1,2\n"), ("a.json", json.dumps({LONG: [{"a": 1}]}))],
    ids=["table", "object"],
)
def test_names_of_a_file_are_shortened(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    (piece,) = places.list_pieces(places.choose_training(DataConfig(train=str(tmp_path / name)))[0].places, 1 << 30)
    with pytest.raises(ValueError, match="xxx") as raised:
        list(places.read_piece(piece))
    assert len(str(raised.value)) < 1000
