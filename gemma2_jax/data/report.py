"""What became of the documents of a source: how many of which shape, and which were left out or changed, and why."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from gemma2_jax.data.wording import describe_count

_FINDINGS = ("dropped", "changed", "long")
_SHORT = 256  # tokens of documents that no row is too short for


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
    long: dict[str, Finding] = field(default_factory=dict)  # documents of more tokens than a power of two, by that
    longest: tuple[int, str] = (0, "")  # tokens of the longest document, and its place

    @property
    def documents(self) -> int:
        """Documents that became tokens."""
        return self.shapes.total()

    def count(self, shape: str, tokens: int, where: str) -> None:
        """Counts a document that became tokens."""
        self.shapes[shape] += 1
        if tokens > self.longest[0]:
            self.longest = tokens, where
        power = _SHORT
        while power < tokens:
            _count(self.long, str(power), Finding(1, where))
            power *= 2

    def drop(self, reason: str, sentence: str) -> None:
        """Counts a document that is left out."""
        _count(self.dropped, reason, Finding(1, sentence))

    def change(self, what: str, where: str) -> None:
        """Counts a document that is written otherwise than it was read."""
        _count(self.changed, what, Finding(1, where))

    def add(self, other: "Report") -> None:
        """Adds the counts of a later part of the source."""
        self.shapes += other.shapes
        self.longest = max(self.longest, other.longest, key=lambda longest: longest[0])
        for name in _FINDINGS:
            for key, finding in getattr(other, name).items():
                _count(getattr(self, name), key, finding)

    def to_json(self) -> dict:
        """What `from_json` takes."""
        found = {name: {key: asdict(finding) for key, finding in getattr(self, name).items()} for name in _FINDINGS}
        return {"shapes": {**self.shapes}, "longest": self.longest, **found}

    @classmethod
    def from_json(cls, saved: dict) -> "Report":
        """The report that `to_json` gave. Raises KeyError or TypeError for what it did not give."""
        found = {name: {key: Finding(**finding) for key, finding in saved[name].items()} for name in _FINDINGS}
        tokens, where = saved["longest"]
        return cls(shapes=Counter(saved["shapes"]), longest=(tokens, where), **found)

    def describe(self) -> Iterator[str]:
        """A sentence for each kind of document that was left out or changed."""
        for reason, finding in self.dropped.items():
            yield f"{describe_count(finding.count, 'document')} left out ({reason}); the first is {finding.first}"
        for what, finding in self.changed.items():
            yield f"{describe_count(finding.count, 'document')}: {what}; the first is {finding.first}"

    def describe_longest(self, length: int) -> str:
        """The longest document, and the first that is longer than a row of so many tokens, if it is."""
        tokens, where = self.longest
        longest = f"the longest has {tokens:,} tokens ({where})"
        finding = self.long.get(str(length))  # of a length that is no power of two, the first is not known
        if finding is None or finding.count == 1:
            return longest
        return f"{longest}; {finding.count:,} have more than {length:,}, of which {finding.first} is the first"


def _count(findings: dict[str, Finding], reason: str, finding: Finding) -> None:
    if reason in findings:
        findings[reason].count += finding.count
    else:
        findings[reason] = Finding(finding.count, finding.first)
