"""Gemma's SentencePiece model, tokenizer.model, as the tokenizer.json that splits every text into the same tokens.

SentencePiece finds its user-defined symbols first, the longest of them at each place; of the rest it joins the two
neighbors whose piece has the highest score. `tokenizers` does the same with added tokens and a list of merges: all ways
to make a piece of two, the piece of the highest score first. transformers 5 has a conversion of its own, which leaves
out the symbols, so that runs of spaces and <table> become other tokens than those that the model was trained on.

Source: bpe_model.cc and normalizer.cc of SentencePiece 0.2; GemmaConverter of transformers 4.57, whose tokens differ
from SentencePiece's where a text has the character ▁ in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gemma2_jax.convert.files.folder import TOKENIZER_JSON, TOKENIZER_MODEL
from gemma2_jax.convert.files.memory import read_bounded
from gemma2_jax.convert.files.safetensors import write_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # the types of pieces
_BPE = 2  # a type of model
_SPACE = "▁"
_TURNS = ("<start_of_turn>", "<end_of_turn>")  # user-defined, and special in every tokenizer.json of Gemma's
_LARGEST_FILE, LONGEST_PIECE = 1 << 26, 200  # Gemma 2's file has 4 MB, and its longest piece 31 characters


class Piece(NamedTuple):
    """What one token stands for."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The numbers of the tokens that programs ask for by their roles; None: there is none."""

    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None

    def names(self, pieces: Sequence[Piece]) -> dict[str, str]:
        """Their texts, under the keys of tokenizer_config.json."""
        return {f"{name}_token": pieces[number].text for name, number in vars(self).items() if number is not None}


def unpack_model(folder: Path, target: Path) -> None:
    """Writes the tokenizer.json of a folder's tokenizer.model into `target`, and its config where `target` has none.

    Raises ValueError where the file is damaged, or of another kind than Gemma's.
    """
    pieces, special = _read_model(folder / TOKENIZER_MODEL)
    write_tokenizer(pieces, special, target)


def write_tokenizer(pieces: Sequence[Piece], special: SpecialTokens, target: Path) -> None:
    """Writes tokenizer.json, and a tokenizer_config.json where there is none."""
    build_tokenizer(pieces, special).save(str(target / TOKENIZER_JSON))
    config = target / "tokenizer_config.json"
    if not config.is_file():
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_json(config, settings | special.names(pieces))


def _read_model(path: Path) -> tuple[list[Piece], SpecialTokens]:
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    module: Any = import_protobuf()
    try:
        model = module.ModelProto.FromString(read_bounded(path, _LARGEST_FILE))
    except DecodeError as error:
        raise ValueError(f"{path} is no model of SentencePiece's, or is damaged ({error}); copy it again") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    pieces = [Piece(piece.piece, piece.score, piece.type) for piece in model.pieces]
    for what, found in {
        "no BPE": trainer.model_type != _BPE,
        "a BPE without bytes for unknown characters": not trainer.byte_fallback,
        "one that rewrites texts before it splits them": normalizer.precompiled_charsmap,
        "one that puts a space before a text": normalizer.add_dummy_prefix,
        "one that removes spaces": normalizer.remove_extra_whitespaces,
        "one with spaces as they are": not normalizer.escape_whitespaces,
        "one with spaces at the ends of words": trainer.treat_whitespace_as_suffix,
        "one with unused pieces": any(piece.kind == UNUSED for piece in pieces),
        f"one with pieces of over {LONGEST_PIECE} characters": any(len(p.text) > LONGEST_PIECE for p in pieces),
        "one with a piece twice": len({piece.text for piece in pieces}) != len(pieces),
    }.items():
        if found:
            raise ValueError(
                f"{path} is of another kind than Gemma's: {what}; copy the model's own tokenizer.json beside it, or "
                "the tokenizer.model of Gemma 2 in its place"
            )
    numbers = (trainer.bos_id, trainer.eos_id, trainer.pad_id, trainer.unk_id)
    bos, eos, pad, unk = (number if 0 <= number < len(pieces) else None for number in numbers)
    return pieces, SpecialTokens(bos=bos, eos=eos, pad=pad, unk=unk)


def build_tokenizer(pieces: Sequence[Piece], special: SpecialTokens) -> Any:
    """The `tokenizers.Tokenizer` of pieces, whose numbers are their places."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocab = {piece.text: number for number, piece in enumerate(pieces)}
    if "\t" not in vocab and "<0x09>" in vocab:  # pieces of several tabs are merged from it
        vocab["\t"] = vocab.pop("<0x09>")
    unknown = None if special.unk is None else pieces[special.unk].text
    merges = _list_merges(pieces, vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    if special.bos is not None:
        bos = pieces[special.bos].text
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, special.bos)]
        )
    tokenizer.add_tokens([
        # Runs of spaces are found where spaces have been replaced.
        AddedToken(text, normalized=_SPACE in text, special=kind != USER_DEFINED or text in _TURNS)
        for text, _, kind in pieces
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ])  # fmt: skip
    return tokenizer


def _list_merges(pieces: Sequence[Piece], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the piece of the highest score first."""
    mergeable = {piece.text for piece in pieces if piece.kind == NORMAL} | ({"\t"} & vocab.keys())
    found = [
        (-piece.score, cut, len(piece.text) - cut, piece.text)
        for piece in pieces
        if piece.kind == NORMAL
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in mergeable and piece.text[cut:] in mergeable
    ]
    return [(text[:cut], text[cut:]) for _, cut, _, text in sorted(found)]
