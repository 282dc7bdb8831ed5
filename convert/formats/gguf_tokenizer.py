"""The tokenizer in a GGUF file, both ways.

llama.cpp has tokenizers of its own, and two of them are Gemma 2's: "llama", SentencePiece's BPE, which joins the pair
whose piece has the highest score; and "gpt2", byte-level BPE with its list of merges, which the tiny model has. A
tokenizer of another kind is refused. What llama.cpp needs does not say all that a tokenizer.json does, so that file is
written too, whole, under the key that GGUF has for it. A tokenizer is read from there; of a file without it, as
llama.cpp's own converter writes them, Gemma's is made from its pieces as from a tokenizer.model.

Source: llama.cpp's conversion/base.py (types and scores of pieces), src/llama-vocab.cpp (what it makes of them).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma2_jax.convert.files.gguf import Array, File, Written, open_file, read_elements
from gemma2_jax.convert.files.safetensors import write_json
from gemma2_jax.convert.formats.sentencepiece import LONGEST_PIECE, Piece, SpecialTokens, write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_JSON, _TEMPLATE = "tokenizer.huggingface.json", "tokenizer.chat_template"
_GGML = "tokenizer.ggml."
_SPECIAL_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6
_PIECES = {"tokens": 8, "scores": 6, "token_type": 5}  # the types of their elements: string, float32, int32
# Control tokens that Gemma's tokenizer does not mark as special.
_CONTROL_LIKE = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<unused.*>")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0

_Spec = dict[str, Any]  # a tokenizer.json


def tokenizer_metadata(tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> dict[str, Written]:
    """The key-value pairs of a tokenizer, to a model with `vocab_size` rows of its embedding.

    Raises ValueError for a tokenizer of another kind than the two that Gemma 2 has, or with more pieces than rows.
    """
    text = tokenizer.backend_tokenizer.to_str()
    spec = json.loads(text)
    kind = _tokenizer_kind(spec)
    pieces, types, scores = _pieces(spec, vocab_size)
    metadata: dict[str, Written] = {
        "model": kind,
        "pre": {"llama": "default", "gpt2": "gpt-2"}[kind],
        "tokens": pieces,
        "token_type": types,
        **({"scores": scores} if kind == "llama" else {"merges": [" ".join(pair) for pair in _merges(spec)]}),
        "add_bos_token": tokenizer("")["input_ids"] == [tokenizer.bos_token_id],
        "add_eos_token": False,
        "add_space_prefix": False,
    }
    for name, key in _SPECIAL_IDS.items():
        token = getattr(tokenizer, f"{name}_id")
        if token is not None:
            metadata[f"{key}_token_id"] = token
    template = {_TEMPLATE: tokenizer.chat_template} if isinstance(tokenizer.chat_template, str) else {}
    return {f"{_GGML}{key}": value for key, value in metadata.items()} | template | {_JSON: text}


def _tokenizer_kind(spec: _Spec) -> str:
    """What llama.cpp calls a tokenizer. Raises ValueError where it has none that splits texts the same way."""
    model, normalizer, pre = spec["model"], spec.get("normalizer"), spec.get("pre_tokenizer")
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    plain = model.get("type") == "BPE" and not any(model.get(option) for option in options)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    # After the normalizer there are no spaces to split at.
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if plain and model.get("byte_fallback") and normalizer == spaces and pre in (None, split):
        return "llama"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if plain and normalizer is None and isinstance(pre, dict) and byte_level.items() <= pre.items():
        return "gpt2"
    raise ValueError(
        "its tokenizer is neither Gemma's (BPE with byte fallback, spaces as ▁) nor a byte-level BPE as GPT-2's is; "
        "llama.cpp has no other that splits texts the same way"
    )


def _pieces(spec: _Spec, vocab_size: int) -> tuple[list[str], list[int], list[float]]:
    """Of every row of the embedding the piece, its type and its score."""
    vocab: dict[str, int] = spec["model"]["vocab"]
    added = spec["added_tokens"]
    largest = max([*vocab.values(), *(token["id"] for token in added)])
    if largest >= vocab_size:
        raise ValueError(f"its tokenizer has {largest + 1} pieces, and its embedding {vocab_size} rows")
    pieces = [f"[PAD{number}]" for number in range(vocab_size)]
    types, scores = [_UNUSED] * vocab_size, [_UNUSED_SCORE] * vocab_size
    ranks = {piece: rank for rank, piece in enumerate(dict.fromkeys(_joined_pieces(spec)))}
    for piece, token in vocab.items():
        is_byte = spec["model"]["byte_fallback"] and _BYTE_PIECE.fullmatch(piece)
        pieces[token], types[token] = piece, _BYTE if is_byte else _NORMAL
        scores[token] = 0.0 if is_byte else float(-ranks.get(piece, len(ranks)))
    for token in added:
        number, text = token["id"], token["content"]
        control = token["special"] or _CONTROL_LIKE.fullmatch(text)
        # llama.cpp looks for these in texts in which spaces are spaces yet.
        pieces[number] = text if control else text.replace("▁", " ")
        types[number], scores[number] = _CONTROL if control else _USER_DEFINED, _ADDED_SCORE
    return pieces, types, scores


def _merges(spec: _Spec) -> list[list[str]]:
    merges = spec["model"]["merges"]
    return [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]


def _joined_pieces(spec: _Spec) -> list[str]:
    """What each merge makes, without the added tokens, for which texts are searched before anything is joined."""
    added = {token["content"] for token in spec["added_tokens"]}
    return [left + right for left, right in _merges(spec) if left + right not in added]


def merge_warnings(metadata: Mapping[str, Written]) -> list[str]:
    """A sentence where llama.cpp would split some texts otherwise, as it joins any two pieces that make a third."""
    if metadata[f"{_GGML}model"] != "llama":
        return []
    spec = json.loads(str(metadata[_JSON]))
    vocab, merges = spec["model"]["vocab"], {tuple(pair) for pair in _merges(spec)}
    added = {token["content"] for token in spec["added_tokens"]}
    lacking = sum(
        (piece[:cut], piece[cut:]) not in merges
        for piece in vocab
        if piece not in added and not _BYTE_PIECE.fullmatch(piece)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab and not {piece[:cut], piece[cut:]} & added
    )
    order = _joined_pieces(spec)
    seen: set[str] = set()
    moved = 0
    for before, piece in zip(["", *order], order, strict=False):
        moved += piece in seen and piece != before
        seen.add(piece)
    if not lacking and not moved:
        return []
    return [
        f"llama.cpp joins any two pieces that make a third, the earliest third first; the tokenizer has {lacking:,} "
        f"such pairs that it never joins, and {moved:,} merges in another order, so that llama.cpp splits some texts "
        "otherwise"
    ]


def has_tokenizer(file: File) -> bool:
    """Whether the file has its tokenizer.json in it, or the pieces of Gemma's tokenizer."""
    return isinstance(file.metadata.get(_JSON), str) or _has_pieces(file)


def _has_pieces(file: File) -> bool:
    """Whether llama.cpp splits texts by the file's pieces as Gemma's tokenizer does."""
    get = file.metadata.get
    arrays = [get(f"{_GGML}{key}") for key in _PIECES]
    kinds = [(array.kind, array.length) for array in arrays if isinstance(array, Array)]
    lengths = [length for _, length in kinds]
    whole = [kind for kind, _ in kinds] == [*_PIECES.values()] and len({*lengths}) == 1
    options = [get(f"{_GGML}{key}") for key in ("model", "add_bos_token", "add_eos_token", "add_space_prefix")]
    return whole and options[:2] == ["llama", True] and options[2] in (None, False) and options[3] is False


def _unpack_pieces(path: Path, metadata: Mapping[str, Any], folder: Path) -> None:
    """Writes the tokenizer.json of the pieces, as of a tokenizer.model. Raises ValueError where they are damaged."""
    texts, scores, kinds = (read_elements(path, metadata[f"{_GGML}{key}"]) for key in _PIECES)
    while kinds and kinds[-1] == _UNUSED:  # rows of the embedding beyond the tokenizer's
        kinds.pop()
    pieces = [
        # llama.cpp has spaces as spaces in what is searched for, and calls control what Gemma's tokenizer does not.
        Piece(text.replace(" ", "▁") if kind == _USER_DEFINED else text, score,
              _USER_DEFINED if kind == _CONTROL and text != "<pad>" and _CONTROL_LIKE.fullmatch(text) else kind)
        for text, score, kind in zip(texts, scores, kinds, strict=False)
    ]  # fmt: skip
    ids = {name.removesuffix("_token"): metadata.get(f"{_GGML}{key}_token_id") for name, key in _SPECIAL_IDS.items()}
    wrong = [name for name, number in ids.items() if number is not None and number not in range(len(pieces))]
    if wrong or len({piece.text for piece in pieces}) < len(pieces) or max(map(len, texts), default=0) > LONGEST_PIECE:
        reason = ", ".join(wrong) or "one is there twice, or is too long"
        raise ValueError(f"{path}: its {len(pieces):,} pieces are no tokenizer ({reason}); get it again")
    write_tokenizer(pieces, SpecialTokens(**ids), folder)


def missing_notes(file: File) -> tuple[str, ...]:
    """A sentence about the tokenizer of a file that has no tokenizer.json in it."""
    kind = file.metadata.get(f"{_GGML}model")
    return (
        f"its tokenizer ({kind!r:.40}) is not read, as it does not say all that a tokenizer.json does; give the "
        "model's own, a folder or Hub id, as --hf-config",
    )


def special_ids(file: File) -> dict[str, int]:
    """The numbers of the special tokens that the file states, under the names of config.json."""
    values = {f"{name}_id": file.metadata.get(f"{_GGML}{key}_token_id") for name, key in _SPECIAL_IDS.items()}
    return {name: value for name, value in values.items() if type(value) is int and name != "unk_token_id"}


def unpack_tokenizer(path: Path, folder: Path) -> None:
    """Writes the tokenizer of a GGUF file as transformers reads it. Raises ValueError where it is damaged."""
    metadata = open_file(path).metadata
    text = metadata.get(_JSON)
    if text is None:
        _unpack_pieces(path, metadata, folder)
        _unpack_template(metadata, folder)
        return
    try:
        spec = json.loads(str(text))
        names = {number: piece for piece, number in spec["model"]["vocab"].items()}
        names |= {token["id"]: token["content"] for token in spec["added_tokens"]}
        special = {
            name: names[metadata[f"{_GGML}{key}_token_id"]]
            for name, key in _SPECIAL_IDS.items()
            if f"{_GGML}{key}_token_id" in metadata
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: {_JSON} is no tokenizer.json that fits the file ({error!r:.100})") from error
    (folder / "tokenizer.json").write_text(str(text), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    write_json(folder / "tokenizer_config.json", config)
    _unpack_template(metadata, folder)


def _unpack_template(metadata: Mapping[str, Any], folder: Path) -> None:
    if isinstance(template := metadata.get(_TEMPLATE), str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
