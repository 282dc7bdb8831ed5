"""Records of every shape that data sets have: which document each makes, and what is said of those that make none."""

import json

import numpy as np
import pytest

from gemma2_jax.config import DataConfig
from gemma2_jax.data import encoding, records
from gemma2_jax.data.records import BadRecord, Turn, make_example
from gemma2_jax.data.report import Report

USER, ANSWER = {"role": "user", "content": "if"}, {"role": "assistant", "content": "or"}
SAID = [("user", "if"), ("assistant", "or")]


def example(record, **choices):
    return make_example(record, "a:1", DataConfig(**choices))


# The shape of each record, and its turns.
CONVERSATIONS = {
    "OpenAI": ({"messages": [USER, ANSWER]}, "messages", SAID),
    "beside other columns": ({"messages": [USER, ANSWER], "prompt": "x", "source": 1}, "messages", SAID),
    "system column": ({"system": "is", "messages": [USER, ANSWER]}, "messages", [("system", "is"), *SAID]),
    "messages in JSON, as CSV has them": ({"messages": json.dumps([USER, ANSWER])}, "messages", SAID),
    "empty system column": ({"system": "", "messages": [USER, ANSWER]}, "messages", SAID),
    "two systems": (
        {"system": "x", "messages": [{"role": "system", "content": "is"}, USER, ANSWER]},
        "messages",
        [("system", "is"), *SAID],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "if"}, {"from": "gpt", "value": "or"}]},
        "ShareGPT",
        SAID,
    ),
    "ShareGPT with all roles": (
        {
            "conversations": [
                {"from": "system", "value": "is"},
                {"from": "user", "value": "if"},
                {"from": "model", "value": "or"},
                {"from": "function", "value": "in"},
                {"from": "Assistant", "value": "x"},
            ]
        },
        "ShareGPT",
        [("system", "is"), *SAID, ("tool", "in"), ("assistant", "x")],
    ),
    "ShareGPT with role and content": ({"conversations": [USER, ANSWER], "id": "7"}, "ShareGPT", SAID),
    "Gemini": (
        {"messages": [{"role": "user", "parts": [{"text": "if"}]}, {"role": "model", "parts": [{"text": "or"}]}]},
        "messages",
        SAID,
    ),
    "null keys, as Parquet has them": (
        {"messages": [USER | {"tool_calls": None, "weight": None, "name": None}, ANSWER], "chosen": None},
        "messages",
        SAID,
    ),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "i"}, "f"]}, ANSWER]},
        "messages",
        SAID,
    ),
    "Alpaca": ({"instruction": "if", "input": "x", "output": "or"}, "Alpaca", [("user", "if\n\nx"), SAID[1]]),
    "Alpaca, empty input": ({"instruction": "if", "input": "", "output": "or"}, "Alpaca", SAID),
    "Alpaca, null input": ({"instruction": "if", "input": None, "output": "or"}, "Alpaca", SAID),
    "Alpaca without input": ({"instruction": "if", "output": "or", "text": "Below is"}, "Alpaca", SAID),
    "Alpaca with system": (
        {"system": "is", "instruction": "if", "output": "or"},
        "Alpaca",
        [("system", "is"), *SAID],
    ),
    "Dolly": (
        {"instruction": "if", "context": "x", "response": "or", "category": "c"},
        "Dolly",
        [("user", "if\n\nx"), SAID[1]],
    ),
    "GSM8K": ({"question": "if", "answer": "or"}, "question and answer", SAID),
    "prompt and response": ({"prompt": "if", "response": "or"}, "prompt and response", SAID),
    "query and response": ({"query": "if", "response": "or"}, "query and response", SAID),
    "input and output": ({"input": "if", "output": "or"}, "input and output", SAID),
    "user and assistant": ({"user": "if", "assistant": "or"}, "user and assistant", SAID),
    "TRL's lists": ({"prompt": [USER], "completion": [ANSWER]}, "prompt and completion", SAID),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(name):
    record, shape, turns = CONVERSATIONS[name]
    made = example(record)
    assert (made.shape, [(turn.role, turn.content) for turn in made.turns]) == (shape, turns)
    assert (made.prompt, made.completion, made.where) == ("", "", "a:1")


@pytest.mark.parametrize(
    ("record", "choices", "prompt", "completion"),
    [
        ({"prompt": "Q ", "completion": "A"}, {}, "Q ", "A"),
        ({"prompt": "", "completion": "A"}, {}, "", "A"),
        ({"q": "Q", "a": "A"}, {"columns": "prompt=q,completion=a"}, "Q", "A"),
        ({"q": "Q", "a": "A", "messages": [USER, ANSWER]}, {"columns": "prompt=q,completion=a"}, "Q", "A"),
        ({"c": "{}", "q": "Q?", "completion": "A"}, {"prompt_template": "{{}} {c} {q}"}, "{} {} Q?", "A"),
        ({"q": "Q?", "a": "A"}, {"prompt_template": "{q}:", "columns": "completion=a"}, "Q?:", "A"),
        ({"text": "A", "id": 1}, {"kind": "text"}, "", "A"),
        ({"body": "A", "text": "x"}, {"kind": "text", "columns": "text=body"}, "", "A"),
    ],
)
def test_texts(record, choices, prompt, completion):
    made = example(record, **choices)
    assert (made.prompt, made.completion, made.turns) == (prompt, completion, ())


def test_columns_make_a_conversation():
    made = example({"q": "if", "a": "or", "text": "x"}, columns="user=q,assistant=a")
    assert made.turns == (Turn(role="user", content="if"), Turn(role="assistant", content="or"))


@pytest.mark.parametrize("key", ["weight", "train"])
@pytest.mark.parametrize("values", [(0, 1), (False, True), (0.0, 1.0)])
def test_turns_that_are_not_learned(key, values, tokenizer):
    turns = [USER, ANSWER | {key: values[0]}, USER, ANSWER | {key: values[1]}]
    made = example({"messages": turns})
    assert [turn.is_learned for turn in made.turns] == [True, False, True, True]
    ((tokens, learned),) = encoding.encode_examples([made], tokenizer, DataConfig(), Report())
    assert tokenizer.convert_ids_to_tokens([tokens[at] for at in np.flatnonzero(learned)]) == [
        "or",
        "<end_of_turn>",
        "<eos>",
    ]
    last_first = example({"messages": turns[2:] + turns[:2]})
    ((_, learned),) = encoding.encode_examples([last_first], tokenizer, DataConfig(), Report())
    assert not learned[-1]  # nor is the end of an answer that is not learned


def test_of_prompts_in_messages_no_answer_is_learned():
    made = example({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert [turn.is_learned for turn in made.turns] == [False, False, False, True]


BAD = {
    "list": ([1], "not an object", "holds a list; a document is a JSON object"),
    "no columns": ({"x": None}, "no columns", "has no columns, or nulls alone"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]},
        "content other than text",
        "message 1 has a part of type 'image_url'; Gemma 2 takes text alone",
    ),
    "null content": (
        {"messages": [USER, {"role": "assistant", "content": None}]},
        "null in a message",
        "'content' of message 2 is null; write a text, or remove the message",
    ),
    "tool call": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
        "tool calls",
        "message 2 calls a tool, for which",
    ),
    "role": (
        {"messages": [{"role": "narrator", "content": "x"}, ANSWER]},
        "unknown role",
        "message 1 has the role 'narrator'; roles are user, human",
    ),
    "fraction": ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "weight", "message 2 has the weight 0.5; a message"),
    "nothing learned": ({"messages": [USER, ANSWER | {"weight": 0}]}, "no answer", "every answer has weight 0"),
    "surrogate": ({"prompt": "Q", "completion": "A \ud83d"}, "lone surrogate", r"has \\ud83d without its other half"),
    "preference": (
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        "preference",
        "no training objective for it yet; .*--data.columns completion=chosen$",
    ),
    "preference of messages": (
        {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
        "preference",
        "--data.columns messages=chosen$",
    ),
    "strings as messages": (
        {"messages": ["if", "or"]},
        "not messages",
        "message 1 is a text; it must be an object",
    ),
    "number as content": (
        {"messages": [{"role": "user", "content": 7}]},
        "not a text",
        "the content of message 1 is a number",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records(name):
    record, reason, sentence = BAD[name]
    with pytest.raises(BadRecord, match=f"^a:1: .*{sentence}") as raised:
        example(record)
    assert raised.value.reason == reason


@pytest.mark.parametrize(
    ("record", "column"),
    [
        ({"prompt": "if", "chosen": "or", "rejected": "x"}, "completion"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "messages"),
    ],
)
def test_the_way_out_of_preferences_works(record, column):
    made = example(record, columns=f"{column}=chosen")
    assert made.completion == "or" or made.turns[1].content == "or"


def test_columns_that_are_not_there():
    with pytest.raises(BadRecord, match=r"a:1: has no 'q', 'a' .*; it has 'x'"):
        example({"x": 1}, columns="prompt=q,completion=a")
    with pytest.raises(ValueError, match=r"data.columns names \['promt'\]; it may name answer, assistant"):
        example({"q": 1}, columns="promt=q")
    with pytest.raises(ValueError, match=r"data.columns is 'prompt'; it must be like prompt=question"):
        DataConfig(columns="prompt")


def test_every_shape_has_a_case():
    tested = {shape for _, shape, _ in CONVERSATIONS.values()}
    assert {shape.name for shape in records.SHAPES} == tested | {"preference"}


@pytest.mark.parametrize("template", ["{prompt:>9999999999}", "{prompt!r}", "{prompt:{completion}}"])
def test_templates_have_names_alone_in_their_braces(template):
    """A width would take as much memory as it asks for."""
    with pytest.raises(ValueError, match=r"has more than a name in the braces of 'prompt'; write {prompt}"):
        records._fill_template(template, {"prompt": "a", "completion": "b"}, "a:1")
