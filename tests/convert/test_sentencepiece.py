"""Gemma's tokenizer.model without a tokenizer.json: SentencePiece's own tokens, in training, generation and exports.

The expected tokens are those of SentencePiece 0.2.3 for this model; `test_transformers_4` has one that it trained.
"""

import json
from pathlib import Path

import pytest
from transformers.convert_slow_tokenizer import import_protobuf

from gemma2_jax.convert.formats import gguf_tokenizer
from gemma2_jax.convert.formats.companions import copy_companions, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIAL = (("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN))
SYMBOLS = ("<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁", "▁▁▁", "<b>")
MERGED = ("ab", "▁a", "bc", "abc", "▁ab", "▁abc", "\t\t")  # the first to be merged first
LETTERS = ("▁", "a", "b", "c", "é")
PIECES = [
    *SPECIAL,
    *((text, USER_DEFINED) for text in SYMBOLS),
    *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
    *((text, NORMAL) for text in (*MERGED, *LETTERS)),
]
# What each text becomes, after <bos>.
TOKENS = {
    "": [],
    "abc": [270],
    " abc": [272],
    "ab bc": [267, 274, 269],
    "a  abc": [275, 8, 270],
    "    ": [9, 274],
    "     a": [9, 8, 275],
    "▁ab": [271],
    "▁ ab": [8, 267],
    "a\n\n\nb\n": [275, 7, 6, 276, 6],
    "\t": [20],
    "\t\t\tb": [273, 20, 276],
    "\r\n": [24, 6],
    "é漢": [278, 241, 199, 173],
    "🙂c": [251, 170, 164, 141, 277],
    "<b>ab<start_of_turn>a <end_of_turn>": [10, 267, 4, 275, 274, 5],
    "<d> \0": [71, 111, 73, 274, 11],
}


def make_model(**changes):
    """A small model of SentencePiece's with Gemma's options; the changes are fields of its trainer or normalizer."""
    model = import_protobuf().ModelProto()
    for rank, (text, kind) in enumerate(PIECES):
        model.pieces.add(piece=text, score=-rank if kind == NORMAL else 0, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback = 2, True
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = range(4)
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", False, False
    for name, value in changes.items():
        setattr(trainer if hasattr(trainer, name) else normalizer, name, value)
    return model


def save_model(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(content)
    return folder


def test_texts_become_the_tokens_of_sentencepiece(tmp_path):
    folder = save_model(tmp_path / "gemma", make_model().SerializeToString())
    tokenizer = load_tokenizer(folder)
    assert {text: tokenizer(text)["input_ids"] for text in TOKENS} == {
        text: [2, *tokens] for text, tokens in TOKENS.items()
    }
    assert all(tokenizer.decode(tokens) == text.replace("▁", " ") for text, tokens in TOKENS.items())
    found = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token, tokenizer.name_or_path
    assert found == ("<bos>", "<eos>", "<pad>", "<unk>", str(folder))
    assert tokenizer.chat_template and list(folder.iterdir()) == [folder / "tokenizer.model"]
    gguf = gguf_tokenizer.tokenizer_metadata(tokenizer, len(PIECES))
    assert gguf["tokenizer.ggml.model"] == "llama" and gguf_tokenizer.merge_warnings(gguf) == []


@pytest.mark.parametrize("config", [None, '{ "tokenizer_class":"GemmaTokenizer", "bos_token": "<bos>"}'])
def test_copies_have_the_tokenizer_json_too(tmp_path, config):
    folder = save_model(tmp_path / "gemma", make_model().SerializeToString())
    if config:
        (folder / "tokenizer_config.json").write_text(config)
    (tmp_path / "copy").mkdir()
    copy_companions(folder, None, tmp_path / "copy")
    for name in [file.name for file in folder.iterdir()]:
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()
    special = {name: f"<{name[:3]}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    written = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert written.items() >= (json.loads(config) if config else special).items()
    assert load_tokenizer(tmp_path / "copy")("a  abc")["input_ids"] == [2, *TOKENS["a  abc"]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": 1}, "no BPE"),
        ({"byte_fallback": False}, "without bytes for unknown characters"),
        ({"precompiled_charsmap": b"nfkc"}, "one that rewrites texts before it splits them"),
        ({"add_dummy_prefix": True}, "one that puts a space before a text"),
        ({"remove_extra_whitespaces": True}, "one that removes spaces"),
        ({"escape_whitespaces": False}, "one with spaces as they are"),
        ({"treat_whitespace_as_suffix": True}, "one with spaces at the ends of words"),
    ],
)
def test_a_model_of_another_kind_is_refused(tmp_path, changes, reason):
    folder = save_model(tmp_path, make_model(**changes).SerializeToString())
    with pytest.raises(ValueError, match=rf"tokenizer.model is of another kind than Gemma's: .*{reason}; copy the mo"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [("x", UNUSED, "unused pieces"), ("ab", NORMAL, "twice"), ("x" * 201, NORMAL, "of over")],
)
def test_pieces_that_gemma_has_not_are_refused(tmp_path, text, kind, reason):
    model = make_model()
    model.pieces.add(piece=text, score=-500, type=kind)
    with pytest.raises(ValueError, match=rf"of another kind than Gemma's: .*{reason}"):
        load_tokenizer(save_model(tmp_path, model.SerializeToString()))


def test_a_damaged_model_is_refused(tmp_path):
    whole = make_model().SerializeToString()
    for content in (whole[:-3], b"of SentencePiece", b"\xff" * 9):
        with pytest.raises(ValueError, match=r"tokenizer.model is no model of SentencePiece's, or is damaged"):
            load_tokenizer(save_model(tmp_path, content))
