"""Files of torch.save without torch: equal to torch's own reading and writing, and safe where they are hostile."""

import io
import os
import pickle
import struct
import subprocess
import sys
import time
import weakref
import zipfile
import zlib
from argparse import Namespace
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import fuzz
from megatron_files import FIXTURES, torch_bytes

from gemma2_jax.convert.files import memory, pickles, torch_files
from gemma2_jax.convert.files.pickles import Global, Record
from gemma2_jax.convert.files.torch_files import Stored

FILES = sorted(FIXTURES.glob("**/*.pt"))
LEGACY = FIXTURES / "legacy" / "A_bf16_tp2pp2" / "iter_0000010" / "mp_rank_00_001" / "model_optim_rng.pt"
DTYPES = [np.dtype(dtype) for dtype in pickles.STORAGES.values()]


def assert_same(loaded, expected) -> int:
    """Asserts that content is read as torch reads it; gives the number of tensors."""
    if isinstance(loaded, Stored):
        array = loaded.read()
        assert array.shape == loaded.shape == tuple(expected.shape) and f"torch.{array.dtype.name}" == str(
            expected.dtype
        )
        assert array.tobytes() == torch_bytes(expected) and array.flags.c_contiguous
        return 1
    if isinstance(loaded, dict):
        assert loaded.keys() == expected.keys()
        return sum(assert_same(loaded[key], expected[key]) for key in loaded)
    if isinstance(loaded, list | tuple):
        assert len(loaded) == len(expected)
        return sum(map(assert_same, loaded, expected))
    if isinstance(loaded, Record):
        if loaded.name == "argparse.Namespace":
            assert_same(loaded.state, vars(expected))
        return 0
    if not isinstance(loaded, np.dtype):
        assert loaded == expected and type(loaded) is type(expected)
    return 0


def count_tensors(content) -> int:
    if isinstance(content, dict | list | tuple):
        return sum(map(count_tensors, content.values() if isinstance(content, dict) else content))
    return isinstance(content, torch.Tensor)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FIXTURES)))
def test_fixtures_read_as_torch_reads_them(path, megatron):
    expected = torch.load(path, weights_only=False)
    assert assert_same(torch_files.load_torch(path), expected) == count_tensors(expected)


def read_back(content, tmp_path: Path):
    path = tmp_path / "file.pt"
    torch.save(content, path)
    return torch_files.load_torch(path)


@pytest.mark.parametrize("dtype", [*pickles.DTYPES], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 0, 3), (1, 1, 2, 3)], ids=str)
def test_reads_what_torch_writes(dtype, shape, tmp_path):
    torch.manual_seed(0)
    bits = torch.randint(0, 2 if dtype == "torch.bool" else 120, (*shape, pickles.DTYPES[dtype].itemsize))
    expected = bits.to(torch.uint8).view(getattr(torch, dtype.removeprefix("torch."))).reshape(shape)
    assert assert_same(read_back([expected], tmp_path), [expected]) == 1


def test_reads_views_strides_and_shared_storages(tmp_path):
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    views = [base, base[1], base[:, 1:3], base.permute(2, 0, 1), base[::2, ::3], base[2, 3, 4], base[:, :0]]
    parameter = torch.nn.Parameter(base)
    loaded = read_back([*views, parameter, {"a": base}], tmp_path)
    assert_same(loaded, [*views, parameter, {"a": base}])
    for tensor, view in zip(loaded, views, strict=False):
        index = tuple(slice(size // 3, size - size // 4) for size in view.shape)
        assert tensor.read(index).tobytes() == torch_bytes(view[index])
        assert tensor.read(index[:1]).tobytes() == torch_bytes(view[index[:1]])
    with pytest.raises(ValueError, match=r"expanded tensor; save it again after \.contiguous\(\)"):
        read_back(torch.ones(3, 1).expand(3, 1000), tmp_path)


def test_reads_only_the_bytes_of_the_part(tmp_path, monkeypatch):
    (loaded,) = read_back([torch.zeros(100, 10)], tmp_path)
    sizes, read_bytes = [], memory.read_bytes
    monkeypatch.setattr(
        memory,
        "read_bytes",
        lambda path, start, size, *rest: (sizes.append(size), read_bytes(path, start, size, *rest))[1],
    )
    loaded.read((slice(10, 12), slice(None)))
    assert sizes == [80]


@pytest.mark.parametrize("crc", [True, False])
def test_a_whole_storage_s_checksum_is_compared_where_there_is_one(crc, tmp_path):
    path = tmp_path / "file.pt"
    torch.serialization.set_crc32_options(crc)
    try:
        torch.save(torch.full((100,), 7, dtype=torch.uint8), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch_files.load_torch(path).read().tolist() == [7] * 100
    path.write_bytes(path.read_bytes().replace(bytes([7] * 100), bytes([7] * 99 + [8])))
    if crc:
        with pytest.raises(ValueError, match="data/0 does not have its checksum; copy it again"):
            torch_files.load_torch(path).read()
        assert torch_files.load_torch(path).read((slice(0, 99),)).tolist() == [7] * 99
    else:
        assert torch_files.load_torch(path).read()[99] == 8


CONTENT = [
    1,
    2.5,
    None,
    True,
    False,
    "ä\n",
    b"ab\xff",
    -5,
    1 << 40,
    -(1 << 70),
    (),
    (1,),
    (1, 2, 3, 4),
    {},
    {"a": {1: []}},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_reads_what_we_write(dtype, tmp_path):
    arrays = {str(shape): np.ones(shape, dtype) for shape in [(), (0,), (3, 4), (2, 0, 3)]}
    arrays["transposed"] = np.arange(12).reshape(3, 4).astype(dtype).T
    path = tmp_path / "file.pt"
    with open(path, "wb") as file:
        file.write(b"something before it")
        torch_files.save_torch(file, {"content": CONTENT, "arrays": arrays, "dtype": dtype})
        end = file.tell()
        file.write(b"and behind it")
    archive = path.read_bytes()[19:end]
    expected = torch.load(io.BytesIO(archive), weights_only=True)
    assert expected["content"] == CONTENT and str(expected["dtype"]) == f"torch.{dtype.name}"
    for name, array in arrays.items():
        assert tuple(expected["arrays"][name].shape) == array.shape
        assert torch_bytes(expected["arrays"][name]) == array.tobytes()
    loaded = torch_files.load_torch(path, 19, end - 19)
    assert_same(loaded["arrays"], expected["arrays"])
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        assert file.testzip() is None


def test_torch_unpickles_records_into_its_own_classes():
    enum = Record("signal.Signals", (2,))
    written = pickles.dump_pickle([Record("torch.Size", ((2, 3),)), Record("argparse.Namespace", state={"a": 1}), enum])
    size, namespace, signal = pickle.loads(written)
    assert isinstance(size, torch.Size) and size == (2, 3) and namespace == Namespace(a=1) and signal.name == "SIGINT"
    assert pickles.dump_pickle(pickles.load_pickle(written, "it")) == pickles.dump_pickle(
        [(2, 3), *pickles.load_pickle(written, "it")[1:]]
    )


def test_the_archive_is_laid_out_as_torch_s():
    our_file, torch_file = io.BytesIO(), io.BytesIO()
    torch_files.save_torch(our_file, [np.arange(7, dtype=np.int64), np.zeros(0, np.float32)])
    torch.save([torch.arange(7), torch.zeros(0)], torch_file)
    with zipfile.ZipFile(our_file) as our_entries, zipfile.ZipFile(torch_file) as torch_entries:
        for name in our_entries.namelist():
            a, b = our_entries.getinfo(name), torch_entries.getinfo(name)
            header = torch_file.getvalue()[b.header_offset : b.header_offset + 26]
            assert our_file.getvalue()[a.header_offset : a.header_offset + 26] == header
            assert (a.CRC, a.flag_bits, a.extract_version, a.external_attr) == (
                (b.CRC if name != "archive/data.pkl" else a.CRC),
                b.flag_bits,
                b.extract_version,
                b.external_attr,
            )
            start = a.header_offset + 30 + sum(struct.unpack_from("<2H", our_file.getvalue(), a.header_offset + 26))
            assert start % 64 == 0 and zlib.crc32(our_file.getvalue()[start : start + a.file_size]) == a.CRC


def test_arrays_are_asked_for_one_by_one(tmp_path):
    alive = []

    class Lazy:
        shape, dtype = (3,), np.dtype(np.float32)

        def read(self):
            assert not any(ref() is not None for ref in alive)
            array = np.ones(3, np.float32)
            alive.append(weakref.ref(array))
            return array

    with open(tmp_path / "file.pt", "wb") as file:
        torch_files.save_torch(file, [Lazy() for _ in range(5)])
    assert len(alive) == 5 and torch.load(tmp_path / "file.pt")[4].tolist() == [1, 1, 1]


def test_large_archives(tmp_path, monkeypatch):
    # As if 32 bits ended at 1000: sizes and places go to the extra fields, as of files of more than 4 GiB.
    content = [np.arange(n, dtype=np.int32) for n in (100, 300, 5)]
    plain, zip64 = io.BytesIO(), io.BytesIO()
    torch_files.save_torch(plain, content)
    monkeypatch.setattr(torch_files, "_LARGE", 1000)
    torch_files.save_torch(zip64, content)
    assert len(zip64.getvalue()) > len(plain.getvalue())
    assert [x.tolist() for x in torch.load(io.BytesIO(zip64.getvalue()))] == [x.tolist() for x in content]
    (tmp_path / "file.pt").write_bytes(zip64.getvalue())
    assert [x.read().tolist() for x in torch_files.load_torch(tmp_path / "file.pt")] == [x.tolist() for x in content]


@pytest.mark.exhaustive
def test_files_of_more_than_4_gib(tmp_path):
    path, big = tmp_path / "file.pt", np.zeros(1 << 30, np.float32).reshape(1 << 15, -1)
    big[-1, -1] = 7
    with open(path, "wb") as file:
        torch_files.save_torch(file, [big, big[-1]])
    for first, second in ([x.read() for x in torch_files.load_torch(path)], torch.load(path, mmap=True)):
        assert first[-1, -1] == second[-1] == 7
    torch.save([torch.from_numpy(big), torch.from_numpy(big[-1].copy())], path)
    first, second = torch_files.load_torch(path)
    assert first.read((slice((1 << 15) - 1, None),))[0, -1] == second.read()[-1] == 7


# Hostile pickles


class Runs:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def hostile_pickles(sentinel: Path) -> dict[str, bytes]:
    touch = f"touch {sentinel}"
    runs = {
        "system": Runs(os.system, touch),
        "eval": Runs(eval, f"open({str(sentinel)!r}, 'w')"),
        "exec": Runs(exec, f"open({str(sentinel)!r}, 'w')"),
        "open": Runs(open, str(sentinel), "w"),
        "popen": Runs(subprocess.Popen, ["touch", str(sentinel)]),
        "getattr": Runs(getattr, Runs(__import__, "os"), "system"),
        "import": Runs(__import__, "turtle"),
        "load": Runs(torch.load, str(sentinel)),
    }
    numbers = [(number * ((1 << 61) - 1)).to_bytes(10, "little") for number in range(1 << 15, 1 << 16)]
    colliding = b"".join(b"\x8a\x0a" + number + b"N" for number in numbers)
    nested = {"a": [({"b": Runs(os.system, touch)},)]}
    made = {f"{name} {at}": pickle.dumps(x, at) for name, x in runs.items() for at in (2, 3, 4, 5)}
    made |= {f"nested {at}": pickle.dumps(nested, at) for at in range(6)}
    quoted = touch.encode()
    text = b"X" + struct.pack("<I", len(quoted)) + quoted
    return made | {
        "protocol 0": pickle.dumps(Runs(os.system, touch), 0),
        "inst": b"(S'" + quoted + b"'\nios\nsystem\n.",
        "inst, text": b"(" + text + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + text + b"o.",
        "ext": b"\x82\x01" + text + b"\x85R.",
        "newobj_ex": b"\x80\x04cos\nsystem\n" + text + b"\x85}\x92.",
        "newobj": b"\x80\x02cos\nsystem\n" + text + b"\x85\x81.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text + b"\x85R.",
        "by a dotted name": b"\x80\x04\x8c\x08megatron\x8c\x02x\x93\x8c\x05torch\x8c\x12serialization.os.x\x93.",
        "below an allowed name": b"\x80\x04\x8c\x05torch\x8c\x0aSize.mro.x\x93.",
        "import alone": b"cturtle\nTurtle\n.",
        "call of an attribute": b"c__builtin__\ngetattr\n(cmegatron.x\ny\nX\x01\x00\x00\x00atR" + text + b"\x85R.",
        "attribute of an attribute": b"c__builtin__\ngetattr\n(c__builtin__\ngetattr\nX\x01\x00\x00\x00atR.",
        "attribute of an object": b"c__builtin__\ngetattr\n(]X\x01\x00\x00\x00atR.",
        "state of a function": b"cos\nsystem\n}X\x01\x00\x00\x00aNsb.",
        "state of a name": b"ctorch\nSize\n}X\x01\x00\x00\x00aNsb.",
        "state of a list": b"]}X\x0c\x00\x00\x00__setstate__Nsb.",
        "items of an object": b"cargparse\nNamespace\n)\x81K\x01K\x02s.",
        "call of a record": b"cargparse\nNamespace\n)R)R.",
        "arguments that are no tuple": b"cargparse\nNamespace\n]R.",
        "persistent": b"K\x00Q.",
        "persistent text": b"Pabc\n.",
        "large number": b"\x8b\x00\x00\x10\x00" + b"\x7f" * (1 << 20) + b".",
        "number as text": b"L" + b"9" * 100_000 + b"L\n.",
        "large text": b"X\xff\xff\xff\xffabc.",
        "larger text": b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc.",
        "larger bytes": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        "text that is none": b"X\x01\x00\x00\x00\xff.",
        "no such memo": b"h\x05.",
        "empty": b"",
        "no end": b"]",
        "two ends": b"]].",
        "open mark": b"(].",
        "deep key": b"}" + b")" + b"\x85" * 200_000 + b"K\x00s.",
        "dup": b"]2.",
        "colliding keys": b"}(" + colliding + b"u.",
        "tuples as keys": b"}(" + b"".join(b"M" + struct.pack("<H", n) + b"\x85N" for n in range(5000)) + b"u.",
        "a long tuple as key": b"}((" + b"K\x00" * 100_000 + b"tq\x00(" + b"h\x00N" * 10_000 + b"u.",
        "a list as key": b"}]Ns.",
        "odd items": b"}(Nu.",
        "long names again and again": b"X\x40\x42\x0f\x00" + b"a" * 1_000_000 + b"q\x00" + b"h\x00h\x00\x93" * 100_000,
    }  # fmt: skip


def test_hostile_pickles_are_refused_and_run_nothing(tmp_path):
    sentinel = tmp_path / "sentinel"
    for name, data in hostile_pickles(sentinel).items():
        before, start = set(sys.modules), time.process_time()
        with pytest.raises(ValueError, match=r"its pickle|which no") as caught:
            pickles.load_pickle(data, "it")
        assert not isinstance(caught.value, UnicodeError) and len(str(caught.value)) < 1000, name
        assert not sentinel.exists() and set(sys.modules) == before, name
        assert time.process_time() - start < 5, name  # what goes off takes minutes
    with pytest.raises(ValueError, match=r"^it names 'posix.system', which no Megatron checkpoint has; it was not run"):
        pickles.load_pickle(pickle.dumps(Runs(os.system, "x")), "it")


@pytest.mark.parametrize(
    ("start", "wrap"),
    [(b")", b"\x85"), (b"]", b"\x85q\x00]h\x00a"), (b"cargparse\nNamespace\nq\x00)\x81", b"q\x01h\x00)\x81h\x01b")],
    ids=["tuples", "lists", "records"],
)
def test_a_pickle_can_be_deep_and_costs_little(start, wrap):
    # The stack below grows too: what is left there is an error, after the whole was read.
    with pytest.raises(ValueError, match=r"other than one object|damaged") if wrap != b"\x85" else nullcontext():
        pickles.load_pickle(start + wrap * 100_000 + b".", "it")


def test_a_memo_of_large_numbers_costs_nothing():
    assert pickles.load_pickle(b"]r\xff\xff\xff\xffj\xff\xff\xff\xffa.", "it")


def test_members_of_enumerations_by_name_and_by_value():
    text = b"X\x04\x00\x00\x00auto"
    by_name = pickles.load_pickle(b"\x80\x02c__builtin__\ngetattr\n(cmegatron.core.enums\nA\n" + text + b"tR.", "it")
    assert (by_name.name, by_name.args) == ("builtins.getattr", (Global("megatron.core.enums.A"), "auto"))
    by_value = pickles.load_pickle(b"\x80\x02cmegatron.core.enums\nA\nK\x05\x85R.", "it")
    assert (by_value.name, by_value.args) == ("megatron.core.enums.A", (5,))


# Hostile archives


def make_archive(content) -> bytes:
    file = io.BytesIO()
    torch_files.save_torch(file, content)
    return file.getvalue()


def with_pickle(data: bytes, size: int = 40) -> bytes:
    """An archive of a pickle and of one storage."""
    file = io.BytesIO()
    writer = torch_files._Writer(file)
    writer.add("data.pkl", data)
    writer.add("data/0", bytes(size))
    writer.close()
    return file.getvalue()


def tensor_archive(shape, strides, offset=0, count=10, kind="torch.FloatStorage", key="0") -> bytes:
    storage = pickles.Persistent(("storage", Global(kind), key, "cpu", count))
    hooks = Record("collections.OrderedDict")
    return with_pickle(
        pickles.dump_pickle(Record("torch._utils._rebuild_tensor_v2", (storage, offset, shape, strides, False, hooks)))
    )


def zip_archive(**options) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("a/data.pkl", pickles.dump_pickle([1]))
    return file.getvalue()


def edited(data: bytes, at: int, form: str, value: int) -> bytes:
    edit = bytearray(data)
    struct.pack_into(form, edit, at, value)
    return bytes(edit)


def legacy_torch() -> bytes:
    file = io.BytesIO()
    torch.save([torch.ones(3)], file, _use_new_zipfile_serialization=False)
    return file.getvalue()


GOOD = make_archive([np.arange(10, dtype=np.float32)])
DIRECTORY = GOOD.find(b"PK\1\2")
BAD = {
    "empty": (b"", "not a file of torch.save"),
    "text": (b"hello" * 100, "not a file of torch.save"),
    "cut short": (GOOD[:-100], "has no end"),
    "compressed": (zip_archive(compression=zipfile.ZIP_DEFLATED), "compressed archive, which torch does not write"),
    "encrypted": (edited(GOOD, DIRECTORY + 8, "<H", 0x809), "compressed archive"),
    "two sizes": (edited(GOOD, DIRECTORY + 20, "<I", 5), "compressed archive"),
    "no pickle": (zip_archive().replace(b"data.pkl", b"date.pkl"), "not one of torch.save"),
    "another folder": (zip_archive().replace(b"a/data.pkl", b"a_data.pkl"), "more than one folder"),
    "before 1.6": (legacy_torch(), "format of torch before 1.6; load it with torch and torch.save it again"),
    "big-endian": (GOOD.replace(b"little", b"biggie"), "byteorder does not have its checksum"),
    "entry outside": (edited(GOOD, DIRECTORY + 42, "<I", 1 << 30), "overlap|outside itself"),
    "entries that overlap": (edited(GOOD, GOOD.find(b"PK\1\2", DIRECTORY + 4) + 42, "<I", 8), "overlap"),
    "entry too large": (edited(edited(GOOD, DIRECTORY + 20, "<I", 1 << 30), DIRECTORY + 24, "<I", 1 << 30), "overlap"),
    "name twice": (make_archive([np.ones(1), np.ones(1)]).replace(b"data/1", b"data/0"), "have one name"),
    "directory outside": (edited(GOOD, len(GOOD) - 6, "<I", 1 << 30), "outside itself"),
    "entries without number": (edited(GOOD, len(GOOD) - 12, "<H", 60000), "directory is short"),
    "shape beyond the data": (tensor_archive((11,), (1,)), "a tensor larger than its data"),
    "offset beyond the data": (tensor_archive((10,), (1,), 1), "a tensor larger than its data"),
    "stride beyond the data": (tensor_archive((2, 5), (6, 1)), "a tensor larger than its data"),
    "negative": (tensor_archive((-1,), (1,)), "impossible shape"),
    "negative stride": (tensor_archive((3,), (-1,), 5), "impossible shape"),
    "negative offset": (tensor_archive((3,), (1,), -1), "impossible shape"),
    "absurd": (tensor_archive((1 << 62, 1 << 62), (0, 0)), "impossible shape"),
    "absurd and empty": (tensor_archive((0, 1 << 62, 1 << 62), (1, 1, 1)), "impossible shape"),
    "expanded": (tensor_archive((1 << 40,), (0,)), "expanded tensor"),
    "too many dims": (tensor_archive((1,) * 65, (1,) * 65), "impossible shape"),
    "fewer strides": (tensor_archive((2, 5), (1,)), "impossible shape"),
    "numel": (tensor_archive((10,), (1,), count=11), "has not its size"),
    "negative numel": (tensor_archive((10,), (1,), count=-10), "has not its size"),
    "other dtype": (tensor_archive((10,), (1,), kind="torch.DoubleStorage"), "has not its size"),
    "no dtype": (tensor_archive((10,), (1,), kind="torch.storage.UntypedStorage", count=40), "of an unknown kind"),
    "no storage": (tensor_archive((10,), (1,), key="1"), "lacks a tensor's data"),
    "no storage class": (tensor_archive((10,), (1,), kind="torch.Size", count=40), "of an unknown kind"),
    "another reference": (with_pickle(pickles.dump_pickle(pickles.Persistent(("module", "0")))), "reference"),
    "a tensor of nothing": (
        with_pickle(pickles.dump_pickle(Record("torch._utils._rebuild_tensor_v2", ()))), "unknown kind"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_damaged_and_hostile_archives_are_refused(name, tmp_path):
    path, (data, message) = tmp_path / "file.pt", BAD[name]
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        plain_content(torch_files.load_torch(path))
    assert str(path) in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="missing; copy it"):
        torch_files.load_torch(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="missing; copy it"):
        torch_files.load_torch(tmp_path)
    (tmp_path / "file.pt").write_bytes(GOOD)
    for offset, length in ((5, None), (0, len(GOOD) + 1), (-1, 5), (0, -1), (len(GOOD) + 1, None), (0, 0)):
        with pytest.raises(ValueError, match=r"file\.pt"):
            torch_files.load_torch(tmp_path / "file.pt", offset, length)


def test_big_endian_files_are_refused(tmp_path):
    file = io.BytesIO()
    writer = torch_files._Writer(file)
    writer.add("data.pkl", pickles.dump_pickle(1))
    writer.add("byteorder", b"big")
    writer.close()
    (tmp_path / "file.pt").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="big-endian machine; save it again on another one"):
        torch_files.load_torch(tmp_path / "file.pt")


# Fuzzing


def plain_content(x):
    """The content of a file in plain types, tensors read."""
    match x:
        case Stored():
            return x.shape, x.dtype, x.read().tobytes()
        case dict():
            return [(plain_content(key), plain_content(value)) for key, value in x.items()]
        case list() | tuple():
            return [plain_content(item) for item in x]
        case Record():
            return x.name, plain_content(x.args), plain_content(x.state)
    return x


FUZZED = {
    "common": (FIXTURES / "megatron_lm" / "A_f32_tp1pp1" / "iter_0000010" / "common.pt", 600),
    "train_state": (FIXTURES / "torch_dist" / "A_f32_tp1pp1" / "latest_train_state.pt", 1500),
    "legacy": (LEGACY, 300),
}  # fmt: skip


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", FUZZED)
def test_files_with_one_thing_changed_read_as_before_or_not_at_all(name, times, tmp_path):
    path, count = FUZZED[name]
    whole, target = repr(plain_content(torch_files.load_torch(path))), tmp_path / "file.pt"

    def attempt(data: bytes) -> None:
        target.write_bytes(data)
        assert repr(plain_content(torch_files.load_torch(target))) == whole

    assert fuzz(attempt, path.read_bytes(), count * times) < count * times


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_pickles_with_one_thing_changed_do_no_harm(times, tmp_path):
    with zipfile.ZipFile(FUZZED["common"][0]) as file:
        data = file.read("common/data.pkl")
    fuzz(lambda changed: pickles.load_pickle(changed, "it"), data, 300 * times)


def test_ordered_dicts_and_their_attributes(tmp_path):
    module = torch.nn.Linear(2, 3)
    loaded = read_back(module.state_dict(), tmp_path)  # an OrderedDict with an attribute, _metadata
    assert assert_same(loaded, OrderedDict(module.state_dict())) == 2 and type(loaded) is dict
