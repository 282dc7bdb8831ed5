"""From a store of documents to rows of a fixed length: which documents share a row, and a row's arrays.

Plain texts are put end to end and cut at the end of each row; other documents are kept whole, as many in a row as fit,
or one in each. Which document goes where is planned from the lengths alone, once; `plans` keeps the plan beside the
tokens. The tokens of a row are read from the store when it is asked for. Batches, epochs and processes are the business
of `batches`.

Memory for a plan grows with the number of documents, by some 50 bytes each, and not with their tokens.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from gemma2_jax.data.plans import Plan, keep_plan
from gemma2_jax.data.store import Sliced, Store

_BLOCK_TOKENS = 1 << 22  # tokens of a store whose `learned` is in memory at one time


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """What a row holds of one document."""

    tokens: np.ndarray  # int32 [length], or [length + 1] with the token after it where the document goes on
    learned: np.ndarray  # bool, of each of these
    length: int  # tokens that the row holds


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of `length` tokens, by number."""

    store: Store
    length: int  # tokens in a row, T
    plan: Plan

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row's arrays, as `write_row` has them."""
        segments = []
        for begin, length, end in zip(*self._find_pieces(index), strict=True):
            part = slice(begin, min(begin + length + 1, end))
            segments.append(Segment(tokens=self.store.tokens[part], learned=self.store.learned[part], length=length))
        return write_row(segments, self.length)

    def _find_pieces(self, index: int) -> tuple[list[int], list[int], list[int]]:
        """Of each piece of a row: where in the store it begins, its length, and where its document ends."""
        plan = self.plan
        if plan.kind == "cut":
            # Positions are counted in the documents put end to end, where no comment says that they are in the store.
            row_start, row_end = index * self.length, min((index + 1) * self.length, plan.tokens)
            first, last = np.searchsorted(plan.bounds, [row_start, row_end - 1], side="right")
            documents, document_ends = plan.order[first : last + 1], plan.bounds[first : last + 1]
            begins, ends = self.store.offsets[documents], self.store.offsets[documents + 1]  # in the store
            document_starts = document_ends - (ends - begins)
            starts = np.maximum(document_starts, row_start)
            begins = begins + starts - document_starts
            lengths = np.minimum(document_ends, row_end) - starts
        else:
            documents = plan.order[plan.bounds[index] : plan.bounds[index + 1]]
            begins, ends = self.store.offsets[documents], self.store.offsets[documents + 1]
            lengths = np.minimum(ends - begins, self.length)
        return begins.tolist(), lengths.tolist(), ends.tolist()


def write_row(segments: Iterable[Segment], length: int) -> dict[str, np.ndarray]:
    """The arrays of a row of `length` tokens with these segments, all [T].

    tokens (int32) is the input, 0 where padded; targets (int32) the token after each in the same document, and weights
    (float32) 1 where that counts in the loss, both 0 where there is none; segments (int32) tells the row's documents
    apart, from 1, and is 0 where padded; positions (int32) counts from 0 in each of them.
    """
    arrays = empty_batch(length)
    start = 0  # where in the row the segment starts
    for number, segment in enumerate(segments, start=1):
        columns, known = slice(start, start + segment.length), slice(start, start + len(segment.tokens) - 1)
        arrays["tokens"][columns] = segment.tokens[: segment.length]
        arrays["segments"][columns] = number
        arrays["positions"][columns] = np.arange(segment.length)
        arrays["targets"][known] = segment.tokens[1:]
        arrays["weights"][known] = segment.learned[1:]
        start += segment.length
    return arrays


def empty_batch(length: int) -> dict[str, np.ndarray]:
    """A row that is all padding."""
    arrays: dict[str, np.ndarray] = {
        name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segments", "positions")
    }
    return arrays | {"weights": np.zeros(length, np.float32)}


def pack_documents(store: Store, *, length: int, packing: bool, concatenate: bool, seed: int) -> Rows:
    """The rows of a store's documents, whose order is shuffled by `seed`.

    With `packing`, documents are put end to end and cut where a row ends (`concatenate`), or kept whole; without it,
    each has its own row. A document that is kept whole and is longer than a row loses its end, and is dropped if all
    its learned tokens are in that end: both are counted. The plan is read from the store's folder if it is there, and
    kept there if not. Raises ValueError if no document is left.
    """

    def make_plan() -> Plan:
        # RandomState's stream never changes; default_rng's may with NumPy, and a resumed run would see other rows.
        random = np.random.RandomState(seed)
        if packing and concatenate:
            return plan_cuts(store, length, random)
        return plan_whole_documents(store, length, random, packing=packing)

    kind = "single" if not packing else "cut" if concatenate else "whole"
    return Rows(store=store, length=length, plan=keep_plan(store, f"{kind}-{length}-{seed}", make_plan))


def plan_cuts(store: Store, length: int, random: np.random.RandomState) -> Plan:
    """Documents end to end, cut every `length` tokens. The last target of a row is the first token of the next."""
    order = random.permutation(len(store.offsets) - 1)
    document_ends = np.cumsum(np.diff(store.offsets)[order])
    rows = -(-(int(document_ends[-1]) - 1) // length)  # the last token has no target, so it gets no row of its own
    _, targets = count_learned(store.learned, np.zeros(0, np.int64))
    return Plan(
        kind="cut",
        rows=rows,
        documents=len(order),
        tokens=min(int(document_ends[-1]), rows * length),
        targets=targets,
        truncated=0,
        dropped=0,
        bounds=document_ends,
        order=order,
    )


def plan_whole_documents(store: Store, length: int, random: np.random.RandomState, *, packing: bool) -> Plan:
    """Documents whole, or without their end where they are longer than a row: as many in a row as fit, or one each."""
    order = random.permutation(len(store.offsets) - 1)
    lengths = np.diff(store.offsets)
    long = np.flatnonzero(lengths > length)
    begins, ends = store.offsets[long], store.offsets[long + 1]
    # The first token of a document is predicted from nothing, and the last that a row predicts is not in the row.
    before, targets = count_learned(store.learned, np.stack([begins + 1, begins + length + 1, ends], axis=1).ravel())
    first, cut, last = before.reshape(-1, 3).T
    dropped = long[first == cut]
    if len(dropped) == len(order):
        raise ValueError(f"every document's learned tokens begin after the first {length}; raise train.sequence_length")
    if len(dropped):
        is_kept = np.ones(len(order), bool)
        is_kept[dropped] = False
        order = order[is_kept[order]]
    lengths = np.minimum(lengths[order], length)
    plan = Plan(
        kind="single",
        rows=len(order),
        documents=len(order),
        tokens=int(lengths.sum()),
        targets=targets - int((last - cut).sum()),
        truncated=len(long) - len(dropped),
        dropped=len(dropped),
        bounds=np.arange(len(order) + 1),
        order=order,
    )
    if not packing:
        return plan
    by_row, bounds = assign_rows(lengths, length, random)
    return replace(plan, kind="whole", rows=len(bounds) - 1, bounds=bounds, order=order[by_row])


def assign_rows(lengths: np.ndarray, length: int, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """The documents by the row they are in, [documents], and the first of each row and their number, [rows + 1].

    Documents of one length are alike to the plan, and get their places in the order in which they come. A plan puts the
    longest documents into its first rows, with short ones to fill them up. That would be an order to learn from, and
    the first rows no sample to evaluate on, so rows are numbered at random here; and `batches` shuffles them again in
    every epoch. Positions and attention begin anew in each document, so its place within a row does not matter.
    """
    # A stable sort of 16 bits is a radix sort, which is several times as fast.
    by_length = np.argsort((length - lengths).astype(np.uint16 if length < 1 << 16 else np.int64), kind="stable")
    placements = plan_rows(np.bincount(lengths, minlength=length + 1), length)
    each, first_row, rows = placements.T
    stops = np.cumsum(each * rows)
    number = random.permutation(int((first_row + rows).max()))
    row = np.empty(len(lengths), np.int64)  # of the documents in the order of `by_length`
    for stop, count, first, span in zip(stops.tolist(), each.tolist(), first_row.tolist(), rows.tolist(), strict=True):
        row[stop - count * span : stop] = np.repeat(number[first : first + span], count)
    by_row = by_length[np.argsort(row, kind="stable")]
    return by_row, np.concatenate([[0], np.cumsum(np.bincount(row))])


def plan_rows(counts: np.ndarray, length: int) -> np.ndarray:
    """Best-fit decreasing packing of documents of which there are `counts[n]` with n tokens, n from 1 to `length`.

    From the longest document to the shortest, each goes to the row that it fills best. Documents of one length and
    rows with one number of tokens left are taken together, so the work grows with the number of lengths and not of
    documents: a row takes as many of a length as fit, which leaves less than half of its room, so that it is looked at
    a few times at most.

    Returns int64 [placements, 3], by falling length: how many documents go into each of these rows, the first of the
    rows, and how many rows. Rows are numbered as they open.
    """
    open_rows: dict[int, list[tuple[int, int]]] = defaultdict(list)  # (first, how many) by the tokens left in each
    spaces: list[int] = []  # the keys of `open_rows`, in order
    placements, opened = [], 0

    def put_back(space: int, first: int, rows: int) -> None:
        if space and rows:
            if not open_rows[space]:
                insort(spaces, space)
            open_rows[space].append((first, rows))

    for need in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[need])
        while left:
            best = bisect_left(spaces, need)
            if best < len(spaces):
                space = spaces[best]
                first, rows = open_rows[space].pop()
                if not open_rows[space]:
                    spaces.pop(best)
            else:
                space, first, rows = length, opened, -(-left // (length // need))
                opened += rows
            each = space // need
            full = min(rows, left // each)
            rest = min(left - full * each, each) if full < rows else 0  # documents that one more row takes
            for number, start, span in ((each, first, full), (rest, first + full, 1)):
                if number and span:
                    placements.append((number, start, span))
                    put_back(space - number * need, start, span)
                    left -= number * span
            taken = full + (rest > 0)
            put_back(space, first + taken, rows - taken)
    return np.array(placements, np.int64)


def count_learned(learned: Sliced, positions: np.ndarray) -> tuple[np.ndarray, int]:
    """How many tokens before each of the positions, in rising order, are learned; and how many in all."""
    counts, total = np.zeros(len(positions), np.int64), 0
    for start in range(0, len(learned), _BLOCK_TOKENS):
        block = learned[start : start + _BLOCK_TOKENS]
        low, high = np.searchsorted(positions, [start + 1, start + len(block) + 1])
        if low < high:
            counts[low:high] = np.cumsum(block, dtype=np.int32)[positions[low:high] - start - 1]
            counts[low:high] += total
        total += int(np.count_nonzero(block))
    return counts, total
