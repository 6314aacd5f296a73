"""The batches that training takes from tokens: a pure function of (seed, step), without a state.

    stream    the documents end to end, again and again     a row: a window of it
    pairs                                                   a row: one prompt, given, and its answer

So a resumed run needs a step number only. Neither reads nor writes a file of its own.
"""

import warnings
from collections.abc import Iterator

import numpy as np
import torch

from esolm.algorithms.algorithm import Batch
from esolm.corpus import DataError
from esolm.noise import generator
from esolm.shards import TokenData

_ROUNDS = 8  # four leave neighbours of small ranges together too often
_OFFSETS, _WINDOWS, _ENDS = 10, 11, 13  # purposes of random numbers


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
        sizes = data.spans[:, 2] - data.spans[:, 0]
        self._ends = np.cumsum(sizes)  # of each document, in the stream
        self._total = int(self._ends[-1])
        self.num_rows = len(sizes) if data.paired else self._total // length
        """Rows of an epoch; 0 if the text is shorter than a window: it has windows to score, but no batches."""
        self.num_cut = int((sizes > length).sum()) if data.paired else 0
        """Pairs that are longer than `length`."""
        if self.num_cut:
            warnings.warn(
                f"{self.num_cut:,} of {len(sizes):,} pairs are longer than {length} tokens and are cut, prompts on the "
                f"left, answers on the right; a length of {int(sizes.max())} holds them all",
                stacklevel=2,
            )

    def batch(self, step: int, start: int, stop: int, total: int) -> Batch:
        """Rows `start` to `stop` of the global batch of `total` rows at a step. DataError if the text is too short."""
        if not self.num_rows:
            raise DataError(
                f"the text has {self._total} tokens, fewer than one window of {self.length}: give more text, "
                f"or choose a length of at most {self._total}"
            )
        epochs, places = np.divmod(step * total + np.arange(start, stop), self.num_rows)
        rows: list[_Row] = []
        for epoch in np.unique(epochs).tolist():
            rows += self._shuffled(epoch, places[epochs == epoch])
        return self._collected(rows)

    def windows(self, batch: int) -> Iterator[Batch]:
        """Every document once, in order: windows on a fixed grid (the last one padded), or pairs. `batch` rows each."""
        if batch < 1:
            raise ValueError(f"a batch must have at least 1 row, got {batch}")
        count = self.num_rows if self.data.paired else -(-self._total // self.length)
        for at in range(0, count, batch):
            rows = range(at, min(at + batch, count))
            yield self._collected([self._pair(row) if self.data.paired else self._window(row) for row in rows])

    def _shuffled(self, epoch: int, places: np.ndarray) -> "list[_Row]":
        """Rows at places of an epoch's order."""
        moved = permuted(places, self.num_rows, self.seed, _WINDOWS, epoch).tolist()
        if self.data.paired:
            return [self._ended(self._pair(place), epoch, place) for place in moved]
        offset = int(generator(self.seed, _OFFSETS, epoch).integers(self._total))
        return [(self._stream(offset + place * self.length, self.length), 0) for place in moved]

    def _window(self, place: int) -> "_Row":
        begin = place * self.length
        return self._stream(begin, min(self.length, self._total - begin)), 0

    def _stream(self, begin: int, count: int) -> np.ndarray:
        """`count` tokens of the endless stream of documents from `begin` on."""
        found = []
        while count:
            begin %= self._total
            document = int(np.searchsorted(self._ends, begin, side="right"))
            first, _, last = (int(place) for place in self.data.spans[document])
            inside = begin - (int(self._ends[document]) - (last - first))
            taken = min(count, last - first - inside)
            found.append(self.data.tokens(first + inside, first + inside + taken))
            begin, count = begin + taken, count - taken
        return np.concatenate(found)

    def _pair(self, place: int) -> "_Row":
        """Tokens of a pair and how many of them are its prompt."""
        begin, answer, end = (int(p) for p in self.data.spans[place])
        end = min(end, answer + self.length)
        begin = max(begin, end - self.length)
        return self.data.tokens(begin, end), answer - begin

    def _ended(self, row: "_Row", epoch: int, place: int) -> "_Row":
        """A pair with the ends-of-text that are drawn to follow it."""
        tokens, prompt = row
        room = self.length - len(tokens)
        count = int(generator(self.seed, _ENDS, epoch, place).integers(room + 1))
        return np.pad(tokens, (0, count), constant_values=self.data.end_id), prompt

    def _collected(self, rows: "list[_Row]") -> Batch:
        tokens = np.full((len(rows), self.length), self.data.end_id)
        places = np.arange(self.length)
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
    outside = np.ones(len(places), dtype=bool)
    while outside.any():
        left, right = places[outside] >> bits, places[outside] & low
        for constant in constants:
            left, right = right, left ^ (_mixed(right + constant) & low)
        places[outside] = left << bits | right
        outside = places >= count
    return places.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Well-mixed bits of integers (the finalizer of splitmix64)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ values >> np.uint64(31)
    return mixed


_Row = tuple[np.ndarray, int]  # tokens, and how many of them are a prompt
