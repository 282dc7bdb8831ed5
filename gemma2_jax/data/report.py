"""What became of the documents of a source: how many of which shape, and which were left out or changed, and why."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field


@dataclass
class Finding:
    """Documents of which the same is to be said."""

    count: int
    first: str  # what is said of the first of them, with its place


@dataclass
class Report:
    """Counts of documents. Those of the parts of a source add up to the source's."""

    shapes: Counter[str] = field(default_factory=Counter)  # documents that became tokens, by shape
    dropped: dict[str, Finding] = field(default_factory=dict)  # documents left out, by reason
    changed: dict[str, Finding] = field(default_factory=dict)  # documents that were written otherwise, by what was done

    @property
    def documents(self) -> int:
        """Documents that became tokens."""
        return self.shapes.total()

    def drop(self, reason: str, sentence: str) -> None:
        """Counts a document that is left out."""
        _count(self.dropped, reason, Finding(1, sentence))

    def change(self, what: str, where: str) -> None:
        """Counts a document that is written otherwise than it was read."""
        _count(self.changed, what, Finding(1, where))

    def add(self, other: "Report") -> None:
        """Adds the counts of a later part of the source."""
        self.shapes += other.shapes
        for reason, finding in other.dropped.items():
            _count(self.dropped, reason, finding)
        for what, finding in other.changed.items():
            _count(self.changed, what, finding)

    def to_json(self) -> dict:
        """What `from_json` takes."""
        findings = {"dropped": self.dropped, "changed": self.changed}
        return {"shapes": {**self.shapes}} | {
            name: {reason: asdict(finding) for reason, finding in found.items()} for name, found in findings.items()
        }

    @classmethod
    def from_json(cls, saved: dict) -> "Report":
        """The report that `to_json` gave. Raises KeyError or TypeError for what it did not give."""
        dropped, changed = (
            {reason: Finding(**finding) for reason, finding in saved[name].items()} for name in ("dropped", "changed")
        )
        return cls(shapes=Counter(saved["shapes"]), dropped=dropped, changed=changed)

    def describe(self) -> Iterator[str]:
        """A sentence for each kind of document that was left out or changed."""
        for reason, finding in self.dropped.items():
            yield f"{_documents(finding.count)} left out ({reason}); the first is {finding.first}"
        for what, finding in self.changed.items():
            yield f"{_documents(finding.count)}: {what}; the first is {finding.first}"


def _count(findings: dict[str, Finding], reason: str, finding: Finding) -> None:
    if reason in findings:
        findings[reason].count += finding.count
    else:
        findings[reason] = Finding(finding.count, finding.first)


def _documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"
