"""Documents as tokens: which of them are learned, and the store that keeps them."""

import copy
import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gemma2_jax.config import DataConfig
from gemma2_jax.data import chat, encoding
from gemma2_jax.data.records import Example, Turn
from gemma2_jax.data.report import Report

TINY = Path(__file__).parents[2] / "assets" / "tiny-gemma2"


def encode(tokenizer, *documents, report=None, **choices):
    return list(encoding.encode_examples(documents, tokenizer, DataConfig(**choices), report or Report()))


def encoded(tokenizer, **document):
    """The tokens as strings, and those of them that are learned, by position."""
    ((ids, learned),) = encode(tokenizer, Example(where="a:1", **document))
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert len(tokens) == len(learned)
    return tokens, {at: tokens[at] for at in range(len(tokens)) if learned[at]}


def talk(*contents):
    return tuple(Turn(role=("user", "assistant")[turn % 2], content=text) for turn, text in enumerate(contents))


def as_messages(turns):
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def test_text_is_learned_whole(tokenizer):
    tokens, learned = encoded(tokenizer, completion="if x")
    assert tokens == ["<bos>", "if", "Ġx", "<eos>"]
    assert learned == {1: "if", 2: "Ġx", 3: "<eos>"}


def test_completion_is_learned_and_the_prompt_is_not(tokenizer):
    tokens, learned = encoded(tokenizer, prompt="if x", completion=": y")
    assert tokens == ["<bos>", "if", "Ġx", ":", "Ġy", "<eos>"]
    assert learned == {3: ":", 4: "Ġy", 5: "<eos>"}


def test_answers_are_learned_in_every_turn(tokenizer):
    tokens, learned = encoded(tokenizer, turns=talk("if", "or ", "in", "is"))
    assert tokens == [
        *("<bos>", "<start_of_turn>", "user", "Ċ", "if", "<end_of_turn>", "Ċ"),
        *("<start_of_turn>", "mode", "l", "Ċ", "or", "<end_of_turn>", "Ċ"),
        *("<start_of_turn>", "user", "Ċ", "in", "<end_of_turn>", "Ċ"),
        *("<start_of_turn>", "mode", "l", "Ċ", "is", "<end_of_turn>", "Ċ", "<eos>"),
    ]
    assert learned == {11: "or", 12: "<end_of_turn>", 24: "is", 25: "<end_of_turn>", 27: "<eos>"}


def test_a_conversation_is_what_the_template_writes(tokenizer):
    turns = talk("a\n\n b", "  c\n", "d", "<e>\n\n")
    ((ids, _),) = encode(tokenizer, Example(where="a:1", turns=turns))
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(as_messages(turns), tokenize=False) + "<eos>"


def test_what_follows_the_last_answer_is_not_learned(tokenizer):
    _, learned = encoded(tokenizer, turns=talk("if", "or", "in"))
    assert learned == {11: "or", 12: "<end_of_turn>"}


def test_bos_comes_once(tokenizer):
    tokens, learned = encoded(tokenizer, prompt="<bos>if", completion="x")
    assert tokens == ["<bos>", "if", "x", "<eos>"]
    assert learned == {2: "x", 3: "<eos>"}
    assert encoded(tokenizer, completion="<bos>x") == (["<bos>", "x", "<eos>"], {1: "x", 2: "<eos>"})
    tokens, _ = encoded(tokenizer, turns=talk("if", "or"))
    assert tokens.count("<bos>") == 1


def test_batches_of_documents_do_not_mix(tokenizer):
    documents = [
        Example(where="a:1", completion="if x"),
        Example(where="a:2", turns=talk("if", "or", "in", "is")),
        Example(where="a:3", prompt="if", completion="x"),
    ]
    one_by_one = [encode(tokenizer, document)[0] for document in documents]
    assert encode(tokenizer, *documents) == one_by_one


def test_messages_that_the_template_does_not_take_are_named(tokenizer):
    with pytest.raises(ValueError, match=r"a:1: the chat template does not take these messages: .*must alternate"):
        encoded(tokenizer, turns=talk("if", "or")[1:])
    other = copy.copy(tokenizer)
    other.chat_template = "{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}"
    with pytest.raises(ValueError, match=r"a:1: .*message 2 in another way when more follows"):
        encoded(other, turns=talk("if", "or", "in", "is"))
    other.chat_template = None
    with pytest.raises(ValueError, match=r"a:1: a conversation needs a chat template, .*set data.tokenizer"):
        encoded(other, turns=talk("if", "or"))


def test_tokenizers_that_will_not_do_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer; it needs tokenizer.json"):
        encoding.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is damaged"):
        encoding.load_tokenizer(tmp_path)
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    settings = json.loads((TINY / "tokenizer_config.json").read_text()) | {"model_max_length": "a"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"is damaged \(TypeError"):
        encoding.load_tokenizer(tmp_path)


SYSTEM = Turn(role="system", content="is")


@pytest.mark.parametrize(
    ("turns", "expected", "said"),
    [
        ((SYSTEM, *talk("if", "or")), talk("is\n\nif", "or"), chat.SYSTEM_MOVED),
        ((*talk("if", "or"), SYSTEM, *talk("x", "y")), talk("if", "or", "is\n\nx", "y"), chat.SYSTEM_MOVED),
        ((SYSTEM, *talk("if", "or")[1:]), talk("is", "or"), chat.SYSTEM_MOVED),
        ((*talk("if"), *talk("x", "or")), talk("if\n\nx", "or"), chat.TURNS_MERGED),
        ((*talk("if", "or"), *talk("x", "y")[1:]), talk("if", "or\n\ny"), chat.TURNS_MERGED),
    ],
)
def test_conversations_that_gemmas_template_does_not_take(tokenizer, turns, expected, said):
    report = Report()
    ((ids, _),) = encode(tokenizer, Example(where="a:1", turns=turns), repeated_roles="merge", report=report)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(as_messages(expected), tokenize=False) + "<eos>"
    assert {what: (finding.count, finding.first) for what, finding in report.changed.items()} == {said: (1, "a:1")}


def test_consecutive_turns_of_one_role_are_refused_or_left_out(tokenizer):
    twice = Example(where="a:1", turns=(*talk("if"), *talk("x", "or")), shape="messages")
    with pytest.raises(ValueError, match=r"a:1: .*must alternate.*; --data.repeated_roles merge joins .*on_bad skip"):
        encode(tokenizer, twice)
    report = Report()
    kept = encode(tokenizer, twice, Example(where="a:2", completion="x", shape="text"), on_bad="skip", report=report)
    assert len(kept) == 1 and report.documents == 1
    assert report.dropped["refused by the chat template"].count == 1
    (sentence,) = report.describe()
    assert sentence.startswith(
        "1 document left out (refused by the chat template); the first is a:1: the chat template"
    )


def test_a_template_that_takes_more_is_left_to_it(tokenizer):
    other = copy.copy(tokenizer)
    cue = "{% if add_generation_prompt %}[assistant]{% endif %}"
    other.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}" + cue
    turns = (SYSTEM, *talk("if"), Turn(role="tool", content="x"), *talk("y", "or"))
    ((ids, _),) = encode(other, Example(where="a:1", turns=turns))
    assert other.decode(ids) == "<bos>[system]is;[user]if;[tool]x;[user]y;[assistant]or;<eos>"


def test_long_documents_are_told_of(tokenizer):
    documents = [
        Example(where=f"a:{number}", completion="if " * words) for number, words in enumerate((3, 600, 1200, 400))
    ]
    first, second = Report(), Report()
    lengths = [len(ids) for ids, _ in encode(tokenizer, *documents[:2], report=first)]
    lengths += [len(ids) for ids, _ in encode(tokenizer, *documents[2:], report=second)]
    first.add(Report.from_json(json.loads(json.dumps(second.to_json()))))
    assert first.longest == (lengths[2], "a:2") and first.documents == 4
    assert {power: (found.count, found.first) for power, found in first.long.items()} == {
        power: (sum(length > int(power) for length in lengths), "a:1" if int(power) < lengths[1] else "a:2")
        for power in first.long
    }
    assert first.describe_longest(256).endswith("(a:2); 3 have more than 256, of which a:1 is the first")
    assert first.describe_longest(4096) == f"the longest has {lengths[2]:,} tokens (a:2)"


def test_control_tokens_in_texts_are_counted(tokenizer):
    def describe(**parts):
        report = Report()
        list(encoding.encode_examples([Example(where="a:1", **parts)], tokenizer, DataConfig(), report))
        return [*report.changed]

    said = "<end_of_turn> in the text is read as that control token, not as its characters"
    answer = Turn(role="assistant", content="a <end_of_turn> b <end_of_turn>")
    assert describe(turns=(Turn(role="user", content="Q"), answer)) == [said]
    assert describe(completion="a <end_of_turn>") == [said]
    assert describe(prompt="<start_of_turn>user", completion="a <end_of_turn>") == []
    assert describe(turns=(Turn(role="user", content="<Q>"), replace(answer, content="a"))) == []


HIDDEN = """
import sys
from gemma2_jax.data import encoding
encoding.hide_torch()
assert encoding.load_tokenizer(sys.argv[1]).chat_template and "torch" not in sys.modules
from transformers.utils import is_torch_available
assert not is_torch_available()
"""
IMPORTED = """
import sys, types
torch = sys.modules["torch"] = types.ModuleType("torch")
from gemma2_jax.data import encoding
encoding.hide_torch()
assert sys.modules["torch"] is torch and "transformers" not in sys.modules
"""


@pytest.mark.parametrize("script", [HIDDEN, IMPORTED], ids=["not imported", "imported before"])
def test_a_tokenizer_is_loaded_without_torch(script):
    done = subprocess.run([sys.executable, "-c", script, str(TINY)], check=True, capture_output=True, text=True)
    assert "PyTorch was not found" not in done.stderr


COMMANDS = {
    "train": ["--config", "tiny_sft", "--data.train", "none.jsonl"],
    "generate": ["--checkpoint", str(TINY), "--prompt", "a"],
    "data.__main__": ["inspect", "none.jsonl", "--data.tokenizer", str(TINY)],
}


@pytest.mark.parametrize("module", COMMANDS)
def test_commands_hide_torch(module, monkeypatch):
    def hide() -> None:
        raise RuntimeError("hidden")

    command = importlib.import_module(f"gemma2_jax.{module}")
    monkeypatch.setattr(encoding, "hide_torch", hide)
    monkeypatch.setattr(sys, "argv", ["command", *COMMANDS[module]])
    with pytest.raises(RuntimeError, match="hidden"):
        command.main()
