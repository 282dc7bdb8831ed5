"""Tokenizers of Gemma's kind in GGUF files: the pieces, scores and types that llama.cpp's own converter gives them.

Its scores and types of a tokenizer that SentencePiece trained with Gemma's options were compared with ours, piece by
piece: they differ in the scores of single characters alone, which nothing is joined by.
"""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers.tokenization_utils_base import generate_merges

from gemma2_jax.convert.files.gguf import open_file, write_gguf
from gemma2_jax.convert.formats import gguf_tokenizer
from gemma2_jax.convert.formats.companions import load_tokenizer


def gemma_tokenizer(folder: Path, merges: list[tuple[str, str]] | None = None) -> Path:
    """A tokenizer built as Gemma's is: SentencePiece's BPE as transformers turns it into a tokenizer.json."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    pieces = [*special, "▁▁", *(f"<0x{byte:02X}>" for byte in range(256)), *JOINED, "a", "b", "c", "▁"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    scores = {"▁▁": 0.0} | {piece: -float(rank) for rank, piece in enumerate(JOINED)}
    ranks = generate_merges(vocab, scores) if merges is None else merges
    bpe = models.BPE(vocab, ranks, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in special if piece != "<mask>"])
    tokenizer.add_tokens([AddedToken("<mask>", normalized=False), AddedToken("▁▁", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {name: f"<{name[:3]}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ bos_token }}", **config})
    )
    return folder


JOINED = ("ab", "▁a", "bc", "abc", "▁ab", "▁abc")  # the first to be joined first


def test_gemma_s_tokenizer_has_the_scores_and_types_that_llama_cpp_s_converter_gives_it(tmp_path):
    tokenizer = load_tokenizer(gemma_tokenizer(tmp_path / "tokenizer"))
    found = gguf_tokenizer.tokenizer_metadata(tokenizer, 276)
    pieces = list(zip(*(found[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "scores")), strict=True))
    control, user_defined, byte, normal, unused = 3, 4, 6, 1, 5
    assert pieces[:8] == [
        ("<pad>", control, -1000.0),
        ("<eos>", control, -1000.0),
        ("<bos>", control, -1000.0),
        ("<unk>", control, -1000.0),
        ("<mask>", control, -1000.0),
        ("<start_of_turn>", control, -1000.0),
        ("<end_of_turn>", control, -1000.0),
        ("  ", user_defined, -1000.0),
    ]
    assert pieces[8:264] == [(f"<0x{number:02X}>", byte, 0.0) for number in range(256)]
    assert pieces[264:270] == [(piece, normal, -float(rank)) for rank, piece in enumerate(JOINED)]
    assert pieces[270:] == [(piece, normal, -6.0) for piece in "abc▁"] + [
        (f"[PAD{n}]", unused, -10000.0) for n in (274, 275)
    ]
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("llama", "default")
    assert "tokenizer.ggml.merges" not in found
    assert gguf_tokenizer.merge_warnings(found) == []
    with pytest.raises(ValueError, match="its tokenizer has 274 pieces, and its embedding 270 rows"):
        gguf_tokenizer.tokenizer_metadata(tokenizer, 270)


def test_the_tokenizer_of_a_file_without_tokenizer_json_is_made_from_its_pieces(tmp_path):
    """As llama.cpp's own converter writes them."""
    original = load_tokenizer(gemma_tokenizer(tmp_path / "tokenizer"))
    metadata = gguf_tokenizer.tokenizer_metadata(original, 276)
    del metadata["tokenizer.huggingface.json"]
    file = tmp_path / "it.gguf"
    write_gguf(file, {"general.architecture": "gemma2"} | metadata, {}, [], lambda size: None)
    assert gguf_tokenizer.has_tokenizer(open_file(file))
    read = load_tokenizer(file)
    vocab = original.get_vocab()
    vocab["\t"] = vocab.pop("<0x09>")  # as Gemma's has it, whose pieces of several tabs are merged from it
    assert read.get_vocab() == vocab and read.chat_template == original.chat_template
    for text in ("abc ab  bc a", "  <mask>abc<end_of_turn>", "cab é <bos>▁a", "", "a\tb"):
        assert read(text)["input_ids"] == original(text)["input_ids"], text
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id, read.unk_token_id) == (2, 1, 0, 3)
    write_gguf(
        file, {"general.architecture": "gemma2"} | metadata | {"tokenizer.ggml.bos_token_id": 274}, {}, [], print
    )
    with pytest.raises(ValueError, match=r"its 274 pieces are no tokenizer \(bos\)"):
        load_tokenizer(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda merges: merges[:-1], "1 such pairs that it never joins, and 0 merges in another order"),
        (lambda merges: [*merges[1:4], *merges[:1], *merges[4:]], "0 such pairs that it never joins, and 1 merges in"),
    ],
)
def test_merges_that_llama_cpp_takes_in_another_order_are_warned_of(change, message, tmp_path):
    spec = json.loads((gemma_tokenizer(tmp_path / "whole") / "tokenizer.json").read_text())
    merges = [pair for pair in spec["model"]["merges"] if pair != ["▁", "▁"]]  # which is an added token
    assert list(dict.fromkeys(left + right for left, right in merges)) == list(JOINED)
    changed = gemma_tokenizer(tmp_path / "changed", [tuple(pair) for pair in change(merges)])
    (warning,) = gguf_tokenizer.merge_warnings(gguf_tokenizer.tokenizer_metadata(load_tokenizer(changed), 274))
    assert message in warning


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(change, tmp_path):
    folder = gemma_tokenizer(tmp_path / "tokenizer")
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(spec | change))
    with pytest.raises(ValueError, match=r"its tokenizer is neither Gemma's .* llama\.cpp has no other"):
        gguf_tokenizer.tokenizer_metadata(load_tokenizer(folder), 274)
