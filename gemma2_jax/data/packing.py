"""From a store of documents to rows of a fixed length: which documents share a row, and a row's arrays.

Plain texts are put end to end and cut at the end of each row; other documents are kept whole, as many in a row as fit,
or one in each. Which piece of which document goes where is planned from the lengths alone; the tokens of a row are read
from the store when it is asked for. Batches, epochs and processes are the business of `batches`.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from gemma2_jax.data.encoding import Store

_OPEN_ROWS = 1000  # how many rows best-fit packing chooses from; with more, rows are fuller and planning takes longer


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of `length` tokens, by number. Row i consists of the pieces starts[i] ... starts[i + 1] - 1."""

    store: Store
    length: int  # tokens in a row, T
    begins: np.ndarray  # int64 [pieces]: where in the store a piece begins
    lengths: np.ndarray  # int64 [pieces]: how many tokens of the row it takes
    ends: np.ndarray  # int64 [pieces]: where in the store its document ends
    starts: np.ndarray  # int64 [rows + 1]: the first piece of each row, and the number of pieces
    documents: int  # documents in the rows, whole or cut
    truncated: int  # how many of those lost their end
    dropped: int  # documents left out, because all their learned tokens were in the end that they would lose
    targets: int  # tokens that count in the loss, over all rows

    @property
    def tokens(self) -> int:
        """Tokens in the rows, padding not counted."""
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row's arrays, all [T].

        tokens (int32) is the input, 0 where padded; targets (int32) the token after each in the same document, and
        weights (float32) 1 where that counts in the loss, both 0 where there is none; segments (int32) tells the
        row's documents apart, from 1, and is 0 where padded; positions (int32) counts from 0 in each of them.
        """
        arrays = empty_batch(self.length)
        start = 0  # where in the row the piece starts
        for segment, piece in enumerate(range(self.starts[index], self.starts[index + 1]), start=1):
            begin, length = int(self.begins[piece]), int(self.lengths[piece])
            known = min(length, int(self.ends[piece]) - begin - 1)  # tokens that another follows in the document
            columns, next_tokens = slice(start, start + length), slice(begin + 1, begin + 1 + known)
            arrays["tokens"][columns] = self.store.tokens[begin : begin + length]
            arrays["segments"][columns] = segment
            arrays["positions"][columns] = np.arange(length)
            arrays["targets"][start : start + known] = self.store.tokens[next_tokens]
            arrays["weights"][start : start + known] = self.store.learned[next_tokens]
            start += length
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
    its learned tokens are in that end: both are counted. Raises ValueError if no document is left.
    """
    # RandomState's stream never changes; default_rng's may with NumPy, and a resumed run would see other rows.
    order = np.random.RandomState(seed).permutation(len(store.offsets) - 1)
    begins, ends = store.offsets[order], store.offsets[order + 1]
    targets = int(np.count_nonzero(store.learned))
    if packing and concatenate:
        return _concatenate_documents(store, begins, ends, length=length, targets=targets)
    long = np.flatnonzero(ends - begins > length)
    has_targets = [store.learned[begins[i] + 1 : begins[i] + length + 1].any() for i in long]
    lost_targets = sum(int(np.count_nonzero(store.learned[begins[i] + length + 1 : ends[i]])) for i in long)
    dropped = long[~np.array(has_targets, bool)]
    begins, ends = np.delete(begins, dropped), np.delete(ends, dropped)
    if not len(begins):
        raise ValueError(f"every document's learned tokens begin after the first {length}; raise train.sequence_length")
    lengths = np.minimum(ends - begins, length)
    row = plan_rows(lengths, length) if packing else np.arange(len(lengths))
    by_row = np.argsort(row, kind="stable")
    return Rows(
        store=store,
        length=length,
        begins=begins[by_row],
        lengths=lengths[by_row],
        ends=ends[by_row],
        starts=np.concatenate([[0], np.cumsum(np.bincount(row))]),
        documents=len(begins),
        truncated=len(long) - len(dropped),
        dropped=len(dropped),
        targets=targets - lost_targets,
    )


def _concatenate_documents(store: Store, begins: np.ndarray, ends: np.ndarray, *, length: int, targets: int) -> Rows:
    """Documents end to end, cut every `length` tokens. The last target of a row is the first token of the next."""
    lengths = ends - begins
    # Positions are counted in the documents put end to end, where no comment says that they are in the store.
    document_ends = np.cumsum(lengths)
    document_starts = document_ends - lengths
    rows = -(-(document_ends[-1] - 1) // length)  # the last token has no target, so it gets no row of its own
    stop = min(document_ends[-1], rows * length)
    edges = np.union1d(np.arange(0, stop, length), document_starts[document_starts < stop])
    document = np.searchsorted(document_ends, edges, side="right")
    return Rows(
        store=store,
        length=length,
        begins=begins[document] + edges - document_starts[document],  # in the store
        lengths=np.diff(edges, append=stop),
        ends=ends[document],  # in the store
        starts=np.append(np.searchsorted(edges, np.arange(0, stop, length)), len(edges)),
        documents=len(begins),
        truncated=0,
        dropped=0,
        targets=targets,
    )


def plan_rows(lengths: np.ndarray, length: int) -> np.ndarray:
    """The row of each document, int64: each in turn goes to the open row that it fills best.

    At most `_OPEN_ROWS` rows are open; to open another, the fullest is closed. Rows are numbered as they open.
    """
    rows = np.empty(len(lengths), np.int64)
    space: list[tuple[int, int]] = []  # (tokens left, row) of the open rows, in order
    opened = 0
    for document, need in enumerate(lengths.tolist()):
        best = bisect_left(space, (need, 0))
        if best < len(space):
            left, row = space.pop(best)
        else:
            left, row, opened = length, opened, opened + 1
        rows[document] = row
        if left > need:
            insort(space, (left - need, row))
        if len(space) > _OPEN_ROWS:
            space.pop(0)
    return rows
