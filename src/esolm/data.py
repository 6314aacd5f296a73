"""The batches that training takes from tokens: a pure function of (seed, step), without a state.

    stream    the documents end to end, again and again     a row: a window of it
    pairs                                                   a row: one prompt, given, and its answer
    mixture   several of these by weight                    a row: a row of one of them

So a resumed run needs a step number only. Neither reads nor writes a file of its own.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np
import torch

from esolm.algorithms.algorithm import Batch
from esolm.corpus import DataError
from esolm.noise import generator
from esolm.shards import TokenData

_ROUNDS = 8  # four leave neighbours of small ranges together too often
_OFFSETS, _WINDOWS, _ENDS, _CORPORA = 10, 11, 13, 14  # purposes of random numbers
_COUNTED = 2**16  # pairs that are measured; of more, as many spread over them
_BLOCK = 256  # rows of a mixture, at least, in which each corpus has its share
_LEAST = 1e-6  # share of a corpus


class Loader:
    """Batches of `length` tokens. Row `r` of step `s` is a function of the seed, `s` and `r` alone.

    Of documents: windows of the stream, each once an epoch in an order of the epoch's own, from a grid that is moved
    every epoch. Of pairs: one pair a row, its prompt given, padded; a long prompt is cut on its left, a long answer on
    its right, and a warning says how many are. To learn from, a pair is followed by a drawn number of further
    ends-of-text, none to all there is room for: a text is written in any order, so a model must know what stands behind
    an answer, or what it puts there misleads it.
    """

    def __init__(self, data: TokenData, *, length: int, seed: int = 0) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.data, self.length, self.seed = data, length, seed
        self._total = data.num_tokens
        self.num_rows = data.num_documents if data.paired else self._total // length
        """Rows of an epoch; 0 if the text is shorter than a window: it has windows to score, but no batches."""
        self.num_cut = 0
        """Pairs that are longer than `length`; of very many, about so many."""
        if data.paired:
            self._count_cut()

    def batch(self, step: int, start: int, stop: int, total: int) -> Batch:
        """Rows `start` to `stop` of the global batch of `total` rows at a step. DataError if the text is too short."""
        return _collected(self.rows(step * total + np.arange(start, stop)), self.length, self.data.end_id)

    def windows(self, batch: int) -> Iterator[Batch]:
        """Every document once, in order: windows on a fixed grid (the last one padded), or pairs. `batch` rows each."""
        if batch < 1:
            raise ValueError(f"a batch must have at least 1 row, got {batch}")
        for at in range(0, self.num_windows, batch):
            rows = [self.window(row) for row in range(at, min(at + batch, self.num_windows))]
            yield _collected(rows, self.length, self.data.end_id)

    def rows(self, numbers: np.ndarray) -> "list[Row]":
        """The rows of these numbers, counted from the first of the first epoch on, without an end."""
        if not self.num_rows:
            raise DataError(
                f"the text has {self._total} tokens, fewer than one window of {self.length}: give more text, "
                f"or choose a length of at most {self._total}"
            )
        epochs, places = np.divmod(numbers, self.num_rows)
        rows: dict[int, Row] = {}
        for epoch in dict.fromkeys(epochs.tolist()):
            inside = np.flatnonzero(epochs == epoch)
            rows.update(zip(inside.tolist(), self._shuffled(epoch, places[inside]), strict=True))
        return [rows[at] for at in range(len(numbers))]  # as they were asked for: a mixture's come in any order

    @property
    def num_windows(self) -> int:
        """Rows of `windows`."""
        return self.num_rows if self.data.paired else -(-self._total // self.length)

    def window(self, place: int) -> "Row":
        """One row of `windows`."""
        if self.data.paired:
            return self._pair(place)
        begin = place * self.length
        return self.data.stream(begin, min(self.length, self._total - begin)), 0

    def _count_cut(self) -> None:
        count = self.data.num_documents
        seen = min(count, _COUNTED)
        spans = self.data.spans(np.arange(seen) * count // seen)
        sizes = spans[:, 2] - spans[:, 0]
        self.num_cut = round(int((sizes > self.length).sum()) * count / seen)
        if self.num_cut:
            warnings.warn(
                f"{self.num_cut:,} of {count:,} pairs are longer than {self.length} tokens and are cut, prompts on the "
                f"left, answers on the right; a length of {int(sizes.max())} holds them all",
                stacklevel=3,
            )

    def _shuffled(self, epoch: int, places: np.ndarray) -> "list[Row]":
        """Rows at places of an epoch's order."""
        moved = permuted(places, self.num_rows, self.seed, _WINDOWS, epoch).tolist()
        if self.data.paired:
            return [self._ended(self._pair(place), epoch, place) for place in moved]
        offset = int(generator(self.seed, _OFFSETS, epoch).integers(self._total))
        return [(self.data.stream(offset + place * self.length, self.length), 0) for place in moved]

    def _pair(self, place: int) -> "Row":
        """Tokens of a pair and how many of them are its prompt."""
        begin, answer, end = self.data.spans(np.array([place]))[0].tolist()
        end = min(end, answer + self.length)
        begin = max(begin, end - self.length)
        return self.data.tokens(begin, end), answer - begin

    def _ended(self, row: "Row", epoch: int, place: int) -> "Row":
        """A pair with the ends-of-text that are drawn to follow it."""
        tokens, prompt = row
        room = self.length - len(tokens)
        count = int(generator(self.seed, _ENDS, epoch, place).integers(room + 1))
        return np.pad(tokens, (0, count), constant_values=self.data.end_id), prompt


class Mixture:
    """Batches of several corpora by weight. Row `r` of step `s` is a function of the seed, `s` and `r` alone, and so is
    the corpus that it is of.

        rows      0 ............ block ............ 2 block ...      each block: so many rows of each corpus, shuffled
        corpus    a b a a c a a b  |  a a b a a c a b  | ...         (a block of 8, weights 5, 2, 1)

    At the end of every block each corpus has had its share of all rows so far, to less than two rows, for ever; and
    each goes through its own epochs, row by row.
    """

    def __init__(self, loaders: Sequence[Loader], weights: Sequence[float], *, seed: int = 0) -> None:
        check_weights(weights, len(loaders))
        if len({(loader.length, loader.data.end_id) for loader in loaders}) != 1:
            raise ValueError("the corpora of a mixture must have one length and one tokenizer")
        self.loaders, self.seed, self.length = tuple(loaders), seed, loaders[0].length
        exact = [Fraction(weight) for weight in weights]
        sums = list(accumulate(exact))
        self._shares = [part / sums[-1] for part in sums]  # cumulative, the last is 1
        self._block = max(_BLOCK, 1 << math.ceil(2 * sums[-1] / min(exact)).bit_length())
        self._end_id = loaders[0].data.end_id

    def batch(self, step: int, start: int, stop: int, total: int) -> Batch:
        """Rows `start` to `stop` of the global batch of `total` rows at a step. DataError if a text is too short."""
        return self._of(step * total + np.arange(start, stop), lambda loader, places: loader.rows(places))

    def windows(self, batch: int) -> Iterator[Batch]:
        """Windows of the corpora by weight, until each has shown all of its own; the small ones show them again."""
        if batch < 1:
            raise ValueError(f"a batch must have at least 1 row, got {batch}")
        shares = [after - before for before, after in pairwise([Fraction(0), *self._shares])]
        count = max(math.ceil(loader.num_windows / share) for loader, share in zip(self.loaders, shares, strict=True))
        for at in range(0, count, batch):
            yield self._of(np.arange(at, min(at + batch, count)), _windows_again)

    def assigned(self, numbers: np.ndarray) -> np.ndarray:
        """The corpus of each row, and which row of that corpus it is. Integers [2, row]."""
        found = np.zeros((2, len(numbers)), dtype=np.int64)
        blocks = numbers // self._block
        for block in dict.fromkeys(blocks.tolist()):
            inside = blocks == block
            places = permuted(numbers[inside] % self._block, self._block, self.seed, _CORPORA, block)
            before, after = self._counts(block), self._counts(block + 1)
            edges = np.cumsum(after - before)
            corpora = np.searchsorted(edges, places, side="right")
            found[:, inside] = corpora, before[corpora] + places - (edges - (after - before))[corpora]
        return found

    def _counts(self, block: int) -> np.ndarray:
        """Rows of each corpus before a block."""
        ends = [math.floor(block * self._block * share) for share in self._shares]
        return np.diff(np.array([0, *ends], dtype=np.int64))

    def _of(self, numbers: np.ndarray, rows_of: "Callable[[Loader, np.ndarray], list[Row]]") -> Batch:
        corpora, places = self.assigned(numbers)
        rows: list[Row | None] = [None] * len(numbers)
        for corpus in np.unique(corpora).tolist():
            inside = np.flatnonzero(corpora == corpus)
            for at, row in zip(inside.tolist(), rows_of(self.loaders[corpus], places[inside]), strict=True):
                rows[at] = row
        return _collected([row for row in rows if row is not None], self.length, self._end_id)


Batches = Loader | Mixture


def check_weights(weights: Sequence[float], count: int) -> None:
    """ValueError unless there is one positive weight for each of `count` corpora."""
    if len(weights) != count:
        raise ValueError(f"there must be one weight for each corpus, got {len(weights)} for {count}")
    for weight in weights:
        if not (0 < weight < math.inf and weight > _LEAST * sum(weights)):
            raise ValueError(f"weights must be positive, each at least a millionth of all, got {weight}: leave it out")


def _windows_again(loader: Loader, places: np.ndarray) -> "list[Row]":
    return [loader.window(place) for place in (places % loader.num_windows).tolist()]


def _collected(rows: "list[Row]", length: int, end_id: int) -> Batch:
    tokens = np.full((len(rows), length), end_id)
    places = np.arange(length)
    for row, (found, _) in zip(tokens, rows, strict=True):
        row[: len(found)] = found
    given = places < np.array([prompt for _, prompt in rows])[:, None]
    valid = places < np.array([len(found) for found, _ in rows])[:, None]
    return Batch(tokens=torch.from_numpy(tokens), given=torch.from_numpy(given), valid=torch.from_numpy(valid))


def permuted(places: np.ndarray, count: int, *key: int) -> np.ndarray:
    """Where a keyed permutation of `range(count)` sends each of `places`: a Feistel network on the next power of four,
    walked until it lands inside. No table is made."""
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    bits, low = np.uint64(half), np.uint64((1 << half) - 1)
    constants = generator(*key).integers(1, 2**62, size=_ROUNDS, dtype=np.uint64)
    places = places.astype(np.uint64)
    outside = np.arange(len(places))
    while len(outside):
        left, right = places[outside] >> bits, places[outside] & low
        for constant in constants:
            left, right = right, left ^ (_mixed(right + constant) & low)
        moved = left << bits | right
        places[outside] = moved
        outside = outside[moved >= count]
    return places.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Well-mixed bits of integers (the finalizer of splitmix64)."""
    values = (values ^ values >> _MIXING[0]) * _MIXING[1]
    values = (values ^ values >> _MIXING[2]) * _MIXING[3]
    mixed: np.ndarray = values ^ values >> _MIXING[4]
    return mixed


_MIXING = tuple(np.array(number, dtype=np.uint64) for number in (30, 0xBF58476D1CE4E5B9, 27, 0x94D049BB133111EB, 31))


Row = tuple[np.ndarray, int]  # tokens, and how many of them are a prompt
