"""A conversation written by its chat template once, with the bounds of its messages.

What leads up to an answer is what the template writes of the messages before it. Writing each beginning of a
conversation by itself takes a run of the template for each. One run is enough for a template that is a loop, of which
every round depends on its own message and on how many came before: then a conversation's beginning is the beginning of
its text. That is read off the syntax tree of the template, and one that might do anything else has no bounds here, such
as a template that counts the messages, looks at the last one or asks for the date.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

_PURE = (  # nodes of a syntax tree whose value depends on the values within them, and which change nothing
    *(nodes.Output, nodes.TemplateData, nodes.Const, nodes.If, nodes.CondExpr, nodes.Getattr, nodes.Getitem),
    *(nodes.Compare, nodes.Operand, nodes.Add, nodes.Sub, nodes.Mod, nodes.Concat, nodes.Not, nodes.And, nodes.Or),
    *(nodes.Name, nodes.Assign, nodes.Filter, nodes.Test, nodes.Call),
)
_IMPURE_FILTERS = ("random", "tojson")  # transformers has a tojson of its own
_LOOP_COUNTS = ("index", "index0", "first")  # which the messages that follow do not change
_FUNCTIONS = ("raise_exception",)
_MARK = "_message_ends"


@dataclass(frozen=True)
class BoundedTemplate:
    """A template that writes a beginning, each message, and an end that is the same for every conversation."""

    template: Template
    special_tokens: dict[str, str]

    def write(self, messages: list[dict[str, str]], *, cue: bool = False) -> list[str]:
        """The beginning, what each message is written as, and the end, which has the generation prompt if `cue`.

        Raises what the template raises.
        """
        mark = "".join(["the end of ", "a message"])  # an object of its own, told apart by identity
        pieces: list[list[str]] = [[]]
        values = self.special_tokens | {"messages": messages, "add_generation_prompt": cue, _MARK: mark}
        for text in self.template.generate(values, tools=None, documents=None):
            if text is mark:
                pieces.append([])
            else:
                pieces[-1].append(text)
        assert len(pieces) == len(messages) + 2
        return ["".join(piece) for piece in pieces]

    @functools.cached_property
    def cue_end(self) -> str:
        """The end with the generation prompt."""
        return self.write([{"role": "user", "content": "a"}], cue=True)[-1]


def bound_messages(source: str, special_tokens: dict[str, str]) -> BoundedTemplate | None:
    """The template with bounds; None where they cannot be read off it."""
    template = _compile(source, frozenset(special_tokens))
    return template and BoundedTemplate(template, special_tokens)


@functools.lru_cache(8)
def _compile(source: str, special_names: frozenset[str]) -> Template | None:
    """The template, with a mark before the first message and after each."""
    # As transformers has it; what it adds, such as `strftime_now` and `generation`, is not known here.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        tree = environment.parse(source)
        loop = _find_loop(tree)
        if loop is None or not _is_bounded(tree, loop, special_names):
            return None
        tree.body.insert(tree.body.index(loop), _make_mark())
        loop.body.append(_make_mark())
        return Template.from_code(environment, environment.compile(tree), environment.make_globals(None))
    except TemplateError:  # of syntax, or of filters that are not known
        return None


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _make_mark() -> nodes.Output:
    return nodes.Output([nodes.Name(_MARK, "load")], lineno=1)


def _find_loop(tree: nodes.Template) -> nodes.For | None:
    """The only loop of a template, where it is one over all messages."""
    loops = list(tree.find_all(nodes.For))
    if len(loops) != 1 or loops[0] not in tree.body:
        return None
    (loop,) = loops
    is_plain = loop.test is None and not loop.else_ and not loop.recursive
    takes_all = isinstance(loop.iter, nodes.Name) and loop.iter.name == "messages"
    return loop if is_plain and takes_all and isinstance(loop.target, nodes.Name) else None


def _is_bounded(tree: nodes.Template, loop: nodes.For, special_names: frozenset[str]) -> bool:
    """Whether the end is always the same, and nothing before it depends on messages that follow, but for the first."""
    assert isinstance(loop.target, nodes.Name)
    at = tree.body.index(loop)
    head, tail = tree.body[:at], tree.body[at + 1 :]
    constants = special_names | {*_FUNCTIONS, "tools", "documents"}
    assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    if assigned & (constants | {"messages", "loop", "add_generation_prompt", _MARK}):
        return False
    return (
        all(_is_pure(node, constants | (assigned - {loop.target.name}), _is_first_message) for node in head)
        and all(_is_pure(node, constants | assigned, _is_past) for node in loop.body)
        and all(_is_pure(node, constants | {"add_generation_prompt"}, lambda _: False) for node in tail)
    )


def _is_pure(node: nodes.Node, names: frozenset[str] | set[str], is_known: Callable[[nodes.Node], bool]) -> bool:
    """Whether a node's value depends on these names alone, and on parts that are known."""
    if is_known(node):
        return True
    if not isinstance(node, _PURE) or (isinstance(node, nodes.Filter) and node.name in _IMPURE_FILTERS):
        return False
    if isinstance(node, nodes.Name):
        return node.name in names
    return all(_is_pure(child, names, is_known) for child in node.iter_child_nodes())


def _is_first_message(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Getitem) and _is_name(node.node, "messages") and node.arg == nodes.Const(0)


def _is_past(node: nodes.Node) -> bool:
    """Whether a part of the loop is the same whatever messages follow: the first message, and the loop's counts."""
    is_count = isinstance(node, nodes.Getattr) and _is_name(node.node, "loop") and node.attr in _LOOP_COUNTS
    return is_count or _is_first_message(node)


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name
