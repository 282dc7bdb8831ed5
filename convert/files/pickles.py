"""Pickles read as data, and written by hand: what a checkpoint needs of the format, without its power to run code.

An unpickler executes what a file tells it to. This one has no such means: a class or function is a name, to call one
makes a `Record` of name and arguments, and nothing is imported. Names that checkpoints of PyTorch and Megatron do not
have are refused all the same, so that a hostile file is told from a strange one. Opcodes that those never have are
refused too; what a file can cost in time and memory is a small multiple of its size.

What is read may share parts and hold itself: walk it by the keys that you expect, and never print it whole.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES = {
    f"torch.{name}": np.dtype(dtype)
    for name, dtype in {
        **{name: name for name in ("float64", "float32", "float16", "complex64", "complex128")},
        **{name: name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")},
        **{name: getattr(jnp, name) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")},
    }.items()
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Storages of other dtypes are untyped, and their elements are bytes.
STORAGES = {
    "torch.DoubleStorage": DTYPES["torch.float64"],
    "torch.FloatStorage": DTYPES["torch.float32"],
    "torch.HalfStorage": DTYPES["torch.float16"],
    "torch.BFloat16Storage": DTYPES["torch.bfloat16"],
    "torch.LongStorage": DTYPES["torch.int64"],
    "torch.IntStorage": DTYPES["torch.int32"],
    "torch.ShortStorage": DTYPES["torch.int16"],
    "torch.CharStorage": DTYPES["torch.int8"],
    "torch.ByteStorage": DTYPES["torch.uint8"],
    "torch.BoolStorage": DTYPES["torch.bool"],
    "torch.ComplexFloatStorage": DTYPES["torch.complex64"],
    "torch.ComplexDoubleStorage": DTYPES["torch.complex128"],
}
# No name is ever resolved; these are the names that checkpoints have, and prefixes of others.
_NAMES = {
    *STORAGES,
    "torch.storage.UntypedStorage",
    "torch.Size",
    "torch.device",
    "torch._C.Generator",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch.serialization._get_layout",
    "collections.OrderedDict",
    "collections.defaultdict",
    "argparse.Namespace",
    "types.SimpleNamespace",
    "signal.Signals",
    "_codecs.encode",
    "io.BytesIO",
    *(f"pathlib{part}.{name}" for part in ("", "._local") for name in ("Path", "PosixPath", "PurePosixPath")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    "numpy.ndarray",
    "numpy.dtype",
    # "__builtin__" is how protocol 2 spells the module.
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset", "list", "dict", "getattr")
    ),
}
_PREFIXES = (
    "torch.distributed.checkpoint.metadata.",
    "torch.distributed.checkpoint.planner.",
    "torch.distributed.checkpoint.filesystem.",
    "megatron.",
    "transformer_engine.",
    "numpy.dtypes.",
)
# Names and keys may be referred to many times, so that looking at one must be quick.
_NAME_LENGTH = 500
_KEY_LENGTH = 5000
_TUPLE_KEYS = 1000  # hashes of tuples can be made to collide, which is quadratic; an optimizer's file has a few of them


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or a function, such as "torch.Size"."""

    path: str


@dataclass(eq=False, repr=False, slots=True)
class Record:
    """An object as its pickle describes it: the name to be called, the arguments, and the object's state."""

    name: str
    args: tuple = ()
    state: Any = None
    new: bool = False  # made by cls.__new__(cls, *args), and not by cls(*args)


@dataclass(frozen=True)
class Persistent:
    """An object that a pickle refers to by a key and does not hold; `dump_pickle` writes it."""

    key: Any


class _Malformed(Exception):
    """A pickle that makes no sense; the message says why."""


def load_pickle(
    data: bytes,
    source: object,
    persistent: Callable[[Any], Any] | None = None,
    calls: Mapping[str, Callable[[tuple], Any]] | None = None,
) -> Any:
    """The content of a pickle: Python's plain types, numpy dtypes for torch's, `Global` and `Record`.

    Args:
      source: the name of the pickle in messages.
      persistent: gives the object for an id that the pickle refers to.
      calls: functions by name, each of which makes the result of a call of that name from its arguments.

    Raises ValueError where it is no pickle, or names or does what no checkpoint does.
    """
    machine = _Machine(data, source, persistent, {**_CALLS, **(calls or {})})
    try:
        return machine.run()
    # A damaged pickle ends early, takes from an empty stack or memo, has text that is not UTF-8, or makes no sense.
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, _Malformed) as error:
        place = f"byte {machine.position} of its pickle" + (f": {error}" if isinstance(error, _Malformed) else "")
        raise ValueError(f"{source} is damaged or cut short ({place}); copy it again") from error


def _torch_size(args: tuple) -> tuple:
    if len(args) != 1 or not isinstance(args[0], tuple):
        raise _Malformed("torch.Size of something else than a tuple")
    return args[0]


def _enum_member(args: tuple) -> Record:
    """Python 3.11 pickles a member of an enumeration as getattr(class, its name)."""
    match args:
        case (Global(path), str()) if not path.startswith(("builtins.", "__builtin__.")):
            return Record("builtins.getattr", args)
    raise _Malformed("an attribute of something else than a class")


# Calls that load_pickle makes itself. The opcodes that follow fill the dicts with their items.
_CALLS: dict[str, Callable[[tuple], Any]] = {
    "torch.Size": _torch_size,
    "builtins.getattr": _enum_member,
    "__builtin__.getattr": _enum_member,
    "collections.OrderedDict": lambda args: {},
    "collections.defaultdict": lambda args: {},
}


class _Machine:
    """The pickle machine: a stack, the stacks below each mark, a memo, and a method for each opcode."""

    def __init__(self, data: bytes, source: object, persistent, calls):
        self.data, self.source, self.persistent, self.calls = data, source, persistent, calls
        self.position, self.stack, self.marked_stacks = 0, list[Any](), list[list[Any]]()
        self.memo, self.globals, self.tuple_keys = dict[int, Any](), dict[str, Any](), 0

    def run(self) -> Any:
        data, opcodes = self.data, _OPCODES
        while True:
            code = data[self.position]
            self.position += 1
            if code == 0x2E:  # STOP
                break
            if code not in opcodes:
                raise ValueError(
                    f"{self.source} has the pickle opcode {code:#04x}, which no checkpoint has; nothing was run. "
                    "It is damaged, or not what it claims to be: get it again from where you trust it to be right"
                )
            opcodes[code](self)
        if len(self.stack) != 1 or self.marked_stacks:
            raise _Malformed("it ends with other than one object")
        return self.stack[0]

    def read_bytes(self, size: int) -> bytes:
        start, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise IndexError
        return self.data[start : self.position]

    def read_number(self, form: struct.Struct) -> Any:
        start, self.position = self.position, self.position + form.size
        return form.unpack_from(self.data, start)[0]

    def read_line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + _NAME_LENGTH)
        if end < 0:
            raise IndexError
        start, self.position = self.position, end + 1
        return self.data[start:end].decode()

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked_stacks.pop()
        return items

    def push_global(self, module: str, name: str) -> None:
        path = f"{module}.{name}"
        if path not in self.globals:
            if path not in DTYPES and path not in _NAMES and not path.startswith(_PREFIXES):
                raise ValueError(
                    f"{self.source} names {path[:200]!r}, which no Megatron checkpoint has; it was not run. "
                    "Do not load this file elsewhere unless you trust whoever wrote it"
                )
            self.globals[path] = DTYPES.get(path, Global(path))
        self.stack.append(self.globals[path])

    def pop_name(self) -> tuple[str, str]:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str) or len(name) + len(module) > _NAME_LENGTH:
            raise _Malformed("a name that is no name")
        return module, name

    def call(self, new: bool) -> None:
        args, callee = self.stack.pop(), self.stack.pop()
        if not isinstance(args, tuple) or not isinstance(callee, Global):
            raise _Malformed("a call of what cannot be called")
        handler = None if new else self.calls.get(callee.path)
        self.stack.append(handler(args) if handler else Record(callee.path, args, new=new))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, dict):  # an OrderedDict's attributes, such as a state dict's versions, are dropped
            raise _Malformed("a state given to what has none")

    def push_persistent(self) -> None:
        if self.persistent is None:
            raise _Malformed("it refers to an object outside")
        self.stack.append(self.persistent(self.stack.pop()))

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise _Malformed("items added to what is no list")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise _Malformed("items set in what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if type(key) is str and len(key) < _KEY_LENGTH else self.checked_key(key)] = value

    def checked_key(self, key: Any) -> Any:
        """A key of a dict, where finding it is quick and safe: a tuple's hash goes as deep as the tuple."""
        parts = key if isinstance(key, tuple) else (key,)
        self.tuple_keys += parts is key
        # Numbers of 61 bits or more can be made to collide.
        if (
            self.tuple_keys > _TUPLE_KEYS
            or len(parts) > 64
            or not all(
                isinstance(part, float | None | Record | Global | np.dtype)
                or (isinstance(part, int) and abs(part) < 1 << 60)
                or (isinstance(part, str | bytes) and len(part) < _KEY_LENGTH)
                for part in parts
            )
        ):
            raise _Malformed("a dict with keys such as no checkpoint has")
        return key

    def memoize(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def read_long(self, size: int) -> int:
        if size > 1024:  # a conversion to text would be quadratic
            raise _Malformed("a number of thousands of digits")
        return int.from_bytes(self.read_bytes(size), "little", signed=True)

    def mark(self) -> None:
        self.marked_stacks.append(self.stack)
        self.stack = []

    def pop_items(self, count: int) -> tuple:
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        if len(items) != count:
            raise IndexError
        return items


_U1, _U2, _U4, _U8 = (struct.Struct(f"<{code}") for code in "BHIQ")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")


def _pushes(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def push(m: _Machine) -> None:
        pushed = value(m)  # this may replace the stack, so it comes before the stack is looked up
        m.stack.append(pushed)

    return push


def _pushes_text(form: struct.Struct) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(m.read_bytes(m.read_number(form)).decode("utf-8", "surrogatepass"))


def _pushes_bytes(form: struct.Struct) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(m.read_bytes(m.read_number(form)))


# Opcodes by their bytes in pickle.py. Missing on purpose are INST and OBJ, the extension registry, keyword arguments,
# sets, buffers out of band, the opcodes of protocols 0 and 1 that hold text, and POP and DUP, which no pickler writes.
_OPCODES: dict[int, Callable[[_Machine], None]] = {
    code[0]: act
    for code, act in {
        b"\x80": lambda m: m.read_bytes(1),  # PROTO
        b"\x95": lambda m: m.read_bytes(8),  # FRAME
        b"(": _Machine.mark,
        b"N": _pushes(lambda m: None),
        b"\x88": _pushes(lambda m: True),
        b"\x89": _pushes(lambda m: False),
        b"K": _pushes(lambda m: m.read_number(_U1)),  # BININT1
        b"M": _pushes(lambda m: m.read_number(_U2)),  # BININT2
        b"J": _pushes(lambda m: m.read_number(_I4)),  # BININT
        b"\x8a": _pushes(lambda m: m.read_long(m.read_number(_U1))),  # LONG1
        b"\x8b": _pushes(lambda m: m.read_long(m.read_number(_U4))),  # LONG4
        b"G": _pushes(lambda m: m.read_number(_F8)),  # BINFLOAT
        b"\x8c": _pushes_text(_U1),  # SHORT_BINUNICODE
        b"X": _pushes_text(_U4),  # BINUNICODE
        b"\x8d": _pushes_text(_U8),  # BINUNICODE8
        b"C": _pushes_bytes(_U1),  # SHORT_BINBYTES
        b"B": _pushes_bytes(_U4),  # BINBYTES
        b"\x8e": _pushes_bytes(_U8),  # BINBYTES8
        b")": _pushes(lambda m: ()),
        b"\x85": _pushes(lambda m: m.pop_items(1)),  # TUPLE1
        b"\x86": _pushes(lambda m: m.pop_items(2)),  # TUPLE2
        b"\x87": _pushes(lambda m: m.pop_items(3)),  # TUPLE3
        b"t": _pushes(lambda m: tuple(m.pop_mark())),  # TUPLE
        b"]": _pushes(lambda m: []),
        b"a": lambda m: m.extend([m.stack.pop()]),  # APPEND
        b"e": lambda m: m.extend(m.pop_mark()),  # APPENDS
        b"}": _pushes(lambda m: {}),
        b"s": lambda m: m.update(list(m.pop_items(2))),  # SETITEM
        b"u": lambda m: m.update(m.pop_mark()),  # SETITEMS
        b"c": lambda m: m.push_global(m.read_line(), m.read_line()),  # GLOBAL
        b"\x93": lambda m: m.push_global(*m.pop_name()),  # STACK_GLOBAL
        b"R": lambda m: m.call(new=False),  # REDUCE
        b"\x81": lambda m: m.call(new=True),  # NEWOBJ
        b"b": _Machine.build,
        b"Q": _Machine.push_persistent,  # BINPERSID
        b"q": lambda m: m.memoize(m.read_number(_U1)),  # BINPUT
        b"r": lambda m: m.memoize(m.read_number(_U4)),  # LONG_BINPUT; a dict's numbers cost nothing by being large
        b"\x94": lambda m: m.memoize(len(m.memo)),  # MEMOIZE
        b"h": _pushes(lambda m: m.memo[m.read_number(_U1)]),  # BINGET
        b"j": _pushes(lambda m: m.memo[m.read_number(_U4)]),  # LONG_BINGET
    }.items()
}


def dump_pickle(content: Any, convert: Callable[[Any], Any] | None = None) -> bytes:
    """A pickle of protocol 2, which torch's restricted unpickler reads, of the types that `load_pickle` gives.

    Args:
      convert: gives the content that is written in place of an object of another type. By default that is a TypeError.
    """
    emitter = _Emitter(convert)
    emitter.put(content)
    return b"\x80\x02" + b"".join(emitter.parts) + b"."


class _Emitter:
    """Collects the pieces of a pickle."""

    def __init__(self, convert: Callable[[Any], Any] | None):
        self.convert, self.parts, self.memo = convert, list[bytes](), dict[Any, bytes]()

    def put(self, x: Any) -> None:
        match x:
            case None:
                self.parts.append(b"N")
            case bool():
                self.parts.append(b"\x88" if x else b"\x89")
            case int() if -(1 << 31) <= x < 1 << 31:
                self.parts.append(b"J" + _I4.pack(x))
            case int():
                size = x.bit_length() // 8 + 1
                self.parts.append(b"\x8a" + _U1.pack(size) + x.to_bytes(size, "little", signed=True))
            case float():
                self.parts.append(b"G" + _F8.pack(x))
            case str():
                text = x.encode("utf-8", "surrogatepass")
                self.put_once(x, b"X" + _U4.pack(len(text)) + text)
            case bytes():  # protocol 2 has no opcode for bytes
                self.put(Record("_codecs.encode", (x.decode("latin1"), "latin1")))
            case tuple():
                self.parts.append(b"(")
                for item in x:
                    self.put(item)
                self.parts.append(b"t")
            case list():
                self.parts.append(b"](")
                for item in x:
                    self.put(item)
                self.parts.append(b"e")
            case dict():
                self.parts.append(b"}(")
                for key, value in x.items():
                    self.put(key)
                    self.put(value)
                self.parts.append(b"u")
            case np.dtype() if x in _DTYPE_NAMES:
                self.put(Global(_DTYPE_NAMES[x]))
            case Global():
                module, _, name = x.path.rpartition(".")
                self.put_once(x, f"c{module}\n{name}\n".encode())
            case Record():
                self.put(Global(x.name))
                self.put(x.args)
                self.parts.append(b"\x81" if x.new else b"R")
                if x.state is not None:
                    self.put(x.state)
                    self.parts.append(b"b")
            case Persistent():
                self.put(x.key)
                self.parts.append(b"Q")
            case _ if self.convert:
                self.put(self.convert(x))
            case _:
                raise TypeError(f"{type(x).__name__} has no place in a checkpoint")

    def put_once(self, key: str | Global, code: bytes) -> None:
        """Writes a name or a text, and later ones of the same value by number, as every record repeats them."""
        if key not in self.memo:
            number = _U4.pack(len(self.memo))
            self.parts.append(code + b"r" + number)
            self.memo[key] = b"j" + number
        else:
            self.parts.append(self.memo[key])
