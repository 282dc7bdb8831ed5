"""The built-in corpus, and the tokenizer that is trained on it."""

import json
import shutil
from pathlib import Path

import pytest
from jinja2 import TemplateError

from gemma2_jax.config import DataConfig
from gemma2_jax.data import python_docs, sources
from gemma2_jax.data.batches import load_tokenizer

TINY = Path(__file__).parents[2] / "assets" / "tiny-gemma2"


def test_documents_hold_signatures_and_docstrings_of_python_and_c():
    texts = "\n".join(python_docs.python_documents().values())
    assert "def json.loads(s, *, cls=None, " in texts
    assert "def math.hypot(" in texts  # written in C
    assert "class collections.deque" in texts  # of _collections, under its public name
    assert 'The "assert" statement' in texts or 'The simple form, "assert expression"' in texts  # a help topic
    assert "test.support" not in texts
    assert len(texts) > 1_500_000


def test_documents_and_answers_are_of_use():
    lengths = [len(text) for text in python_docs.python_documents().values()]
    assert sum(length >= 2000 for length in lengths) > len(lengths) / 2
    talks = [record["messages"] for record in python_docs.python_instructions().values()]
    assert len(talks) > 4000
    for question, answer in talks:
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert 20 <= len(answer["content"]) <= 600
        assert not answer["content"].lower().startswith("see ")
    answers = [answer["content"] for _, answer in talks]
    assert len(set(answers)) == len(answers)


def test_an_instruction_is_a_question_and_the_first_paragraphs():
    module, function = (python_docs.python_instructions()[name] for name in ("module textwrap", "function json.dumps"))
    assert module["messages"][1]["content"] == "Text wrapping and filling."
    assert "textwrap" in module["messages"][0]["content"]
    assert function["messages"][1]["content"].startswith("Serialize ``obj`` to a JSON formatted ``str``.")


@pytest.mark.parametrize("kind", ["text", "instructions"])
def test_held_out_documents_are_not_trained_on(kind):
    data = DataConfig(kind=kind)
    train, held_out = ({example.where for example in sources.read_examples(data, split)} for split in ("train", "eval"))
    everything = python_docs.python_documents() if kind == "text" else python_docs.python_instructions()
    assert not train & held_out
    assert len(train | held_out) == len(everything)
    assert 0.01 < len(held_out) / len(everything) < 0.04


@pytest.fixture(scope="module", params=["alone", "beside the model's config.json"])
def loaded(request, tmp_path_factory):
    folder = shutil.copytree(TINY, tmp_path_factory.mktemp("model") / "tiny")
    (folder / "config.json").unlink(missing_ok=True)
    if request.param != "alone":
        (folder / "config.json").write_text(json.dumps({"model_type": "gemma2", "vocab_size": 4096}))
    return load_tokenizer(str(folder))


def test_tokenizer_has_gemmas_ids(loaded):
    assert len(loaded) == 4096
    assert loaded.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>"]) == [0, 1, 2, 3]
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token_id, loaded.unk_token_id) == (0, 1, 2, 3)
    assert loaded.tokenize("<start_of_turn>a<end_of_turn>") == ["<start_of_turn>", "a", "<end_of_turn>"]
    assert loaded("the")["input_ids"] == [2, loaded.convert_tokens_to_ids("the")]


@pytest.mark.parametrize(
    "text",
    ["  a   b\n\n\n    c \t\t", "I 'm here , . ! n't", "déjà 日本語 😀 \u2581", "".join(map(chr, range(1, 300)))],
)
def test_tokenizer_gives_back_any_text(loaded, text):
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text


def test_chat_template_is_gemmas(loaded):
    messages = [{"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "Yo "}]
    written = loaded.apply_chat_template(messages, tokenize=False)
    assert written == ("<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYo<end_of_turn>\n")
    cued = loaded.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert cued == "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    with pytest.raises(TemplateError, match=r"System role not supported"):
        loaded.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)
    with pytest.raises(TemplateError, match=r"must alternate"):
        loaded.apply_chat_template(messages[1:], tokenize=False)
