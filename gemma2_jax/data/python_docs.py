"""A corpus that needs no download: the documentation inside the Python that runs, as texts and as questions.

It reads the docstrings of the standard library and the help topics of `pydoc`. Modules written in Python are
parsed, not imported; only those written in C are imported, as their docstrings exist nowhere else. The corpus
follows the Python version, and is the same each time under one. `sources` decides which documents are held out.
"""

import ast
import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "site-packages", "dist-packages"}
_SKIPPED |= {"readline", "xxlimited", "xxlimited_35", "xxsubtype"}  # importing readline writes to some terminals
_SKIPPED |= {"displayhook", "excepthook", "unraisablehook", "breakpointhook"}  # programs put in their own
_DOCUMENT_LENGTH = 2000  # characters from which a document is long enough
_ANSWER_LENGTHS = range(20, 601)  # characters an answer may have
_JUNK = re.compile(
    r"see |return self|initialize self|todo|internal|private|\w+\(.*\)$|deprecated|\.\. |[^\w\"'(<]", re.I
)
_QUESTIONS = {
    "module": ("What is the {} module?", "What is the module {} for?", "Describe the {} module."),
    "class": ("What is {}?", "What is the class {}?", "Describe the class {}."),
    "function": ("What does {} do?", "What is {} for?", "Explain {}.", "Describe the function {}."),
    "method": ("What does {} do?", "What is {} for?", "Explain {}.", "Describe the method {}."),
    "topic": ("Explain {} in Python.", "What should I know about {} in Python?"),
}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    name: str  # qualified, such as json.JSONDecoder.decode
    kind: str  # a key of _QUESTIONS
    signature: str  # its first line in a document
    doc: str  # the docstring, dedented


def python_documents() -> dict[str, str]:
    """Name -> plain text, in a fixed order: a module's small docstrings joined, long help topics divided."""
    grouped: dict[str, list[str]] = {}
    for entry in _collect_entries():
        group = f"topic {entry.name}" if entry.kind == "topic" else entry.name.partition(".")[0]
        text = f"{entry.signature}\n\n{entry.doc}" if entry.signature else entry.doc
        grouped.setdefault(group, []).extend(text.split("\n\n") if entry.kind == "topic" else [text])
    return {
        f"{group} {number}": text
        for group, pieces in grouped.items()
        for number, text in enumerate(_join_pieces(pieces), start=1)
    }


def python_instructions() -> dict[str, dict]:
    """Name -> {"messages": [user's question, assistant's answer]}, in a fixed order, with no answer twice."""
    instructions: dict[str, dict] = {}
    answers: set[str] = set()
    for entry in _collect_entries():
        answer = _extract_answer(entry)
        if not answer or answer in answers:
            continue
        answers.add(answer)
        questions = _QUESTIONS[entry.kind]
        question = questions[zlib.crc32(entry.name.encode()) % len(questions)].format(entry.name)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        instructions[f"{entry.kind} {entry.name}"] = {"messages": messages}
    return instructions


def _join_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """Consecutive pieces joined by blank lines, each result long enough except the last."""
    pending: list[str] = []
    for piece in pieces:
        pending.append(piece)
        if sum(map(len, pending)) >= _DOCUMENT_LENGTH:
            yield "\n\n".join(pending)
            pending = []
    if pending:
        yield "\n\n".join(pending)


def _extract_answer(entry: _Entry) -> str:
    """The docstring's first paragraphs, as many as fit; empty when they make no answer."""
    paragraphs = entry.doc.split("\n\n")
    own = entry.name.rpartition(".")[2]
    if len(paragraphs) > 1 and re.match(rf"([\w.]*\.)?{re.escape(own)}\(|\*\*|.*\n(\*\*|==)", paragraphs[0]):
        paragraphs = paragraphs[1:]  # a signature, or a heading
    chosen: list[str] = []
    for paragraph in paragraphs:
        if len("\n\n".join([*chosen, paragraph])) > _ANSWER_LENGTHS[-1]:
            break
        chosen.append(paragraph)
    while chosen and chosen[-1].rstrip().endswith((":", ",")):  # leads into what did not fit
        chosen.pop()
    answer = "\n\n".join(chosen).strip()
    return "" if len(answer) not in _ANSWER_LENGTHS or _JUNK.match(answer) or "::=" in answer else answer


@functools.cache
def _collect_entries() -> tuple[_Entry, ...]:
    """Every documented public name once, and no docstring twice: one could be trained on and held out."""
    unique = []
    names: set[str] = set()
    docs: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated modules and old escapes, which are Python's own business
        entries = [*_read_python_files(), *_read_c_modules(), *_read_topics()]
    for entry in entries:
        if entry.doc and entry.name not in names and entry.doc not in docs:
            names.add(entry.name)
            docs.add(entry.doc)
            unique.append(entry)
    return tuple(unique)


def _read_python_files() -> Iterator[_Entry]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not parts or parts[0] not in sys.stdlib_module_names or any(map(_is_private, parts)):
            continue
        name = ".".join(parts)
        tree = ast.parse(path.read_bytes())
        yield _Entry(name=name, kind="module", signature=f"module {name}", doc=ast.get_docstring(tree) or "")
        yield from _read_definitions(tree.body, name, "function")


def _is_private(name: str) -> bool:
    return name.startswith("_") or name in _SKIPPED


def _read_definitions(body: list[ast.stmt], scope: str, kind: str) -> Iterator[_Entry]:
    """Public functions and classes defined in `body`, the latter with what is defined inside them."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or _is_private(node.name):
            continue
        name, doc = f"{scope}.{node.name}", ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, node.bases))
            yield _Entry(name=name, kind="class", signature=f"class {name}({bases})", doc=doc)
            yield from _read_definitions(node.body, name, "method")
        else:
            yield _Entry(name=name, kind=kind, signature=f"def {name}({ast.unparse(node.args)})", doc=doc)


def _read_c_modules() -> Iterator[_Entry]:
    for module in _import_c_modules():
        public = {"posix": "os"}.get(module.__name__, module.__name__.removeprefix("_"))
        name = public if public in sys.stdlib_module_names else module.__name__
        yield _Entry(name=name, kind="module", signature=f"module {name}", doc=_clean_doc(module))
        for key, value in sorted(vars(module).items()):
            if _is_private(key) or getattr(value, "__module__", None) not in (module.__name__, name):
                continue
            if inspect.isbuiltin(value):
                yield _make_entry(f"{name}.{key}", "function", value)
            elif inspect.isclass(value):
                yield _make_entry(f"{name}.{key}", "class", value)
                for attribute, member in sorted(vars(value).items()):
                    if not _is_private(attribute) and inspect.ismethoddescriptor(member):
                        yield _make_entry(f"{name}.{key}.{attribute}", "method", member)


def _import_c_modules() -> Iterator[ModuleType]:
    for name in sorted(sys.stdlib_module_names):
        if name in _SKIPPED or name.startswith(("_test", "_xx", "_ctypes_test")):
            continue
        spec = importlib.util.find_spec(name)
        if spec and (spec.origin == "built-in" or isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)):
            with contextlib.suppress(ImportError):  # this Python's build lacks the library behind it
                yield importlib.import_module(name)


def _make_entry(name: str, kind: str, value: object) -> _Entry:
    signature = re.sub(r"\$\w+(, /)?(, )?", "", getattr(value, "__text_signature__", None) or "(...)")
    shown = name.removeprefix("builtins.")
    return _Entry(
        name=shown,
        kind=kind,
        signature=f"{'class' if kind == 'class' else 'def'} {shown}{signature}",
        doc=_clean_doc(value),
    )


def _clean_doc(value: object) -> str:
    doc = value.__doc__
    return inspect.cleandoc(doc) if isinstance(doc, str) else ""


def _read_topics() -> Iterator[_Entry]:
    """Help topics, longest first, without the paragraphs that a longer one has: some contain others whole."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = [paragraph for paragraph in text.strip("\n").split("\n\n") if paragraph not in seen]
        seen.update(paragraphs)
        yield _Entry(name=name, kind="topic", signature="", doc="\n\n".join(paragraphs))
