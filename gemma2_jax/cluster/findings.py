"""What the checks before a run find: rows of one table."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was found of one subject.

    Attributes:
      subject: what was looked at.
      found: what was seen there, with numbers.
      verdict: "ok"; "slow", which costs time; "wrong", which costs the run; "skipped".
      reason: by how much it is slow, what is wrong, or why it was skipped.
      advice: what to do.
      numbers: what was measured, by names that end in their units, for programs that read the table.
    """

    subject: str
    found: str
    verdict: Literal["ok", "slow", "wrong", "skipped"] = "ok"
    reason: str = ""
    advice: str = ""
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def judgment(self) -> str:
        """The verdict with its reason, as the table has it."""
        return f"{self.verdict} ({self.reason})" if self.reason else self.verdict


def skip(subject: str, reason: str, advice: str = "") -> Row:
    """The row of a subject that could not be looked at."""
    return Row(subject=subject, found="", verdict="skipped", reason=reason, advice=advice)
