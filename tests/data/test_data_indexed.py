"""Megatron's .bin and .idx: byte for byte as the format has them, read back, and damage that is told apart."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest

from gemma2_jax.config import DataConfig
from gemma2_jax.data.batches import Layout, train_batches
from gemma2_jax.data.megatron import indexed
from gemma2_jax.data.megatron.indexed import IndexedWriter, find_prefix, open_indexed, smallest_dtype
from gemma2_jax.data.megatron.indexed_store import open_indexed_store
from gemma2_jax.data.packing import pack_documents
from gemma2_jax.data.store import Store

# Three documents: 5 6 7, 8, and 9 10, in 16 bits.
BIN = bytes.fromhex("0500 0600 0700 0800 0900 0a00")
HEADER = b"MMIDIDX\0\0" + bytes.fromhex("0100000000000000 08 0300000000000000 0400000000000000")
LENGTHS = bytes.fromhex("03000000 01000000 02000000")
POINTERS = bytes.fromhex("0000000000000000 0600000000000000 0800000000000000")
DOCUMENTS = bytes.fromhex("0000000000000000 0100000000000000 0200000000000000 0300000000000000")
IDX = HEADER + LENGTHS + POINTERS + DOCUMENTS


@pytest.fixture
def prefix(tmp_path):
    (tmp_path / "corpus.bin").write_bytes(BIN)
    (tmp_path / "corpus.idx").write_bytes(IDX)
    return str(tmp_path / "corpus")


def read_documents(prefix):
    """Every document, by a reader written from the format's description."""
    with open(f"{prefix}.idx", "rb") as file:
        assert file.read(9) == b"MMIDIDX\0\0"
        version, code, sequences, documents = struct.unpack("<QBQQ", file.read(25))
        lengths = struct.unpack(f"<{sequences}i", file.read(4 * sequences))
        pointers = struct.unpack(f"<{sequences}q", file.read(8 * sequences))
        firsts = struct.unpack(f"<{documents}q", file.read(8 * documents))
        assert (version, file.read()) == (1, b"")
    size, letter = {4: (4, "i"), 8: (2, "H")}[code]
    content = Path(f"{prefix}.bin").read_bytes()
    places = zip(lengths, pointers, strict=True)
    sequences = [struct.unpack_from(f"<{count}{letter}", content, pointer) for count, pointer in places]
    return size, [sum(sequences[first:last], ()) for first, last in itertools.pairwise(firsts)]


def test_a_small_file_is_written_byte_for_byte(tmp_path):
    with IndexedWriter(str(tmp_path / "a"), np.dtype("<u2"), tmp_path / "partial") as writer:
        writer.write(np.array([5, 6, 7, 8]), np.array([3, 1]))
        assert not (tmp_path / "a.bin").exists()
        writer.write(np.array([9, 10]), np.array([2]))
    assert (tmp_path / "a.bin").read_bytes() == BIN
    assert (tmp_path / "a.idx").read_bytes() == IDX
    assert not any((tmp_path / "partial").iterdir())


@pytest.mark.parametrize("vocabulary", [4096, 65_499, 65_500, 256_000])
def test_what_is_written_in_pieces_is_read_back(tmp_path, monkeypatch, vocabulary):
    monkeypatch.setattr(indexed, "_CHUNK", 7)
    random = np.random.RandomState(0)
    documents = [random.randint(vocabulary, size=size) for size in random.randint(0, 9, 40)]
    prefix = str(tmp_path / "a")
    with IndexedWriter(prefix, smallest_dtype(vocabulary), tmp_path / "partial") as writer:
        for part in (documents[:1], documents[1:20], documents[20:]):
            writer.write(np.concatenate(part), np.array(list(map(len, part))))
    size, read = read_documents(prefix)
    assert size == (2 if vocabulary < 65_500 else 4)
    assert read == [tuple(document) for document in documents]
    data = open_indexed(prefix)
    np.testing.assert_array_equal(data.tokens, np.concatenate(documents))
    np.testing.assert_array_equal(data.lengths, list(map(len, documents)))
    full = [len(document) for document in documents if len(document)]
    np.testing.assert_array_equal(data.document_offsets(), np.cumsum([0, *full]))


@pytest.mark.parametrize("name", ["corpus", "corpus.bin", "corpus.idx"])
def test_any_of_its_names_will_do(prefix, name):
    assert find_prefix(prefix.removesuffix("corpus") + name) == prefix
    assert find_prefix(f"{prefix}.jsonl") is None


@pytest.mark.parametrize(
    ("code", "kind"), [(1, "u1"), (2, "i1"), (3, "i2"), (4, "i4"), (5, "i8"), (8, "u2")], ids=lambda value: str(value)
)
def test_every_dtype_of_tokens_is_read(tmp_path, code, kind):
    size = np.dtype(kind).itemsize
    np.arange(6, dtype=kind).tofile(tmp_path / "a.bin")
    pointers = struct.pack("<3q", 0, 3 * size, 4 * size)
    (tmp_path / "a.idx").write_bytes(HEADER[:17] + bytes([code]) + HEADER[18:] + LENGTHS + pointers + DOCUMENTS)
    assert open_indexed(str(tmp_path / "a")).tokens.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_document_may_be_of_several_sequences(prefix, tmp_path):
    documents = struct.pack("<3q", 0, 2, 3)
    (tmp_path / "corpus.idx").write_bytes(HEADER[:26] + struct.pack("<Q", 3) + LENGTHS + POINTERS + documents)
    assert open_indexed(prefix).document_offsets().tolist() == [0, 4, 6]


@pytest.mark.parametrize(
    ("idx", "bin", "reason"),
    [
        (None, BIN, "corpus.idx does not exist, and .*corpus.bin does; an indexed data set is two files"),
        (IDX, None, "corpus.bin does not exist, and .*corpus.idx does"),
        (None, None, "corpus.idx does not exist, and neither does .*corpus.bin"),
        (b"TNTIDX\0\0" + IDX, BIN, "is of the format TNTIDX, .* tokenize the text again"),
        (b"PK" + IDX, BIN, "is no Megatron index: it begins with b'PKMMIDIDX' and not with"),
        (IDX[:20], BIN, "is cut: it has 20 bytes, and its header alone 34"),
        (IDX[:9] + b"\2" + IDX[10:], BIN, "is of version 2; the one that Megatron-LM writes is 1"),
        (IDX[:17] + b"\x06" + IDX[18:], BIN, "says that corpus.bin holds float64 values; tokens are whole numbers"),
        (IDX[:17] + b"\x07" + IDX[18:], BIN, "says that corpus.bin holds float32 values"),
        (IDX[:17] + b"\x09" + IDX[18:], BIN, "is damaged: 9 is not the code of a dtype"),
        (
            IDX[:-1],
            BIN,
            "is cut: for the 3 sequences and 3 documents of its header it would have 102 bytes, .* has 101",
        ),
        (IDX + b"\0" * 9, BIN, "is damaged: for the 3 sequences"),
        (IDX + b"\0\1\0", BIN, "is of a multimodal data set: sequence 1 is of mode 1, .* Gemma 2 takes text alone"),
        (IDX, BIN[:-1], "is cut in the middle of a token"),
        (IDX, BIN[:-2], "describes 12 bytes of tokens, and corpus.bin has 10: one of them is cut"),
        (IDX, BIN * 2, "describes 12 bytes of tokens, and corpus.bin has 24: one of them is of another data set"),
        (IDX, b"", "describes 12 bytes of tokens, and corpus.bin has 0"),
        (
            HEADER + LENGTHS + POINTERS[:8] + POINTERS[:8] + POINTERS[16:] + DOCUMENTS,
            BIN,
            "its sequence 1 does not begin where the one before",
        ),
        (HEADER + LENGTHS + POINTERS + DOCUMENTS[8:] + DOCUMENTS[:8], BIN, "the documents it lists do not run from"),
    ],
)
def test_damage_is_told_apart(prefix, tmp_path, idx, bin, reason):
    for name, content in (("corpus.idx", idx), ("corpus.bin", bin)):
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        open_indexed(prefix)


def test_modes_of_text_are_nothing_to_mind(prefix, tmp_path):
    (tmp_path / "corpus.idx").write_bytes(IDX + b"\0\0\0")
    assert open_indexed(prefix).tokens.tolist() == [5, 6, 7, 8, 9, 10]


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    writer = IndexedWriter(str(tmp_path / "a"), np.dtype("<u2"), tmp_path / "partial")
    with pytest.raises(ValueError, match="token 65536 does not fit uint16"), writer:
        writer.write(np.array([65_536]), np.array([1]))
    assert [path.name for path in tmp_path.rglob("*")] == ["partial"]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("split", "first", "last"), [("train", 0, 30), ("eval", 30, 38)])
def test_it_is_packed_like_any_tokenized_text(tmp_path, tokenizer, packing, split, first, last):
    """All tokens are learned but the first of a document, which nothing predicts; an empty document is none."""
    random = np.random.RandomState(0)
    documents = [random.randint(3, 4096, size) for size in random.randint(1, 60, 40)]
    with IndexedWriter(str(tmp_path / "a"), np.dtype("<u2"), tmp_path / "partial") as writer:
        lengths = np.array([*map(len, documents[:5]), 0, *map(len, documents[5:])])
        writer.write(np.concatenate(documents), lengths)
    data = DataConfig(kind="text", train=str(tmp_path / "a.bin"), split_shares="75,20,5")
    indexed = open_indexed_store(data, split, str(tmp_path / "a"), tokenizer, tmp_path / "cache")
    part = documents[first:last]
    learned = np.concatenate([np.arange(len(document)) > 0 for document in part])
    offsets = np.cumsum([0, *map(len, part)])
    store = Store(tokens=np.concatenate(part).astype(np.int32), learned=learned, offsets=offsets)
    given, expected = (
        pack_documents(each, length=32, packing=packing, concatenate=True, seed=7) for each in (indexed, store)
    )
    assert (given.plan.targets, len(given)) == (expected.plan.targets, len(expected))
    for number in range(len(expected)):
        row = given[number]
        for name, array in expected[number].items():
            np.testing.assert_array_equal(row[name], array)
            assert row[name].dtype == array.dtype


def test_splits_of_other_data_are_an_error(tmp_path, jsonl, tokenizer):
    data = DataConfig(kind="text", train=jsonl({"text": "a"}), split_shares="9,1")
    with pytest.raises(
        ValueError, match=r"data.split_shares 9,1 divides .bin and .idx files, and .*data.jsonl is none; --data"
    ):
        train_batches(data, tokenizer, Layout(sequence_length=8, batch_size=1), cache=tmp_path)
    for wrong in ("9", "9,x", "1,2,3,4", "0,1", "-1,2"):
        with pytest.raises(ValueError, match="it must be like 9999,8,2: trained on, held out and left"):
            DataConfig(split_shares=wrong)
    with pytest.raises(ValueError, match="both say what is held out; give one"):
        DataConfig(split_shares="9,1", eval="b")


def test_no_file_is_written_over(prefix, tmp_path):
    with pytest.raises(ValueError, match=r"corpus\.bin exists already; delete it, or give another prefix"):
        IndexedWriter(prefix, np.dtype("<u2"), tmp_path / "partial")
    with pytest.raises(ValueError, match=r"is a folder; give the beginning of two files' names, such as .*/corpus"):
        IndexedWriter(str(tmp_path), np.dtype("<u2"), tmp_path / "partial")
