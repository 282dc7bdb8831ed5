"""What the site shows of docstrings that griffe, which reads them, would pass over: its extension.

Examples are shown as code, and the comments beside the fields of a dataclass as a table.
"""

import re

import griffe

EXAMPLE = re.compile(r"(?:^>>> .*\n?)(?:^.+\n?)*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Completes docstrings before they are rendered."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Puts what begins with `>>>` into a fenced block, up to the next empty line."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(
                lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", obj.docstring.value
            )

    def on_class_members(self, *, cls: griffe.Class, **_: object) -> None:
        """Lists a dataclass's fields with the comment beside or above each."""
        if cls.docstring is None or "dataclass" not in cls.labels:
            return
        lines = [f"  {name}: {comment}" for name, field in cls.attributes.items() if (comment := read_comment(field))]
        if lines:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)


def read_comment(field: griffe.Attribute) -> str:
    """The comment at the end of a field's line, or on the lines above it."""
    assert isinstance(field.lineno, int) and field.parent is not None
    lines = field.parent.module.lines_collection[field.parent.module.filepath]
    beside = re.search(r"  # (.*)$", lines[field.lineno - 1])
    if beside:
        return beside[1]
    above = []
    for line in reversed(lines[: field.lineno - 1]):
        if not line.strip().startswith("# "):
            break
        above.insert(0, line.strip().removeprefix("# "))
    return " ".join(above)
