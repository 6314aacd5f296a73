"""Tokens on disk, memory-mapped: documents one after the other, each closed by end-of-text.

    folder/   tokens-00000.bin ...   the tokens, end to end over the files
              documents.npy          where each document begins, where its answer begins (of pairs), and where it ends
              index.json tokenizer.json manifest.json

Nothing is held that grows with the text: a shard is mapped when it is read, and what is learned from and what is held
out are a few runs of documents, each one range of tokens. It makes no tokens (`tokenizing` does).
"""

import mmap
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from esolm import plain, seal
from esolm.corpus import DataError
from esolm.noise import generator

INDEX, DOCUMENTS, TOKENIZER = "index.json", "documents.npy", "tokenizer.json"
_ALLOWED = re.compile(r"index\.json|documents\.npy|tokenizer\.json|tokens-\d{5}\.bin")
_MAPPED = 512  # shards that are mapped at once, each with a file open: a process may have a thousand
_RUNS = 4096  # runs of documents that a split chooses from
_CHECKED = 2**20  # documents looked at together when all are checked
_SPLIT = 12  # purpose of random numbers


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenData:
    """Documents as tokens: `documents[i]` is where document `i` begins, where its answer begins (its own beginning, if
    it is no pair) and where it ends (its end-of-text included), in the shards laid end to end.

    It shows those in `parts`, runs of documents: the first, the one behind the last, and their range of tokens."""

    shards: Sequence[np.ndarray]
    sizes: np.ndarray  # [shard], in tokens
    documents: np.ndarray  # [document, 3]
    parts: np.ndarray  # [part, 4]
    end_id: int
    vocab_size: int
    tokenizer_digest: str
    paired: bool = False

    @staticmethod
    def open(folder: Path, *, digests: bool = False) -> "TokenData":
        """What `tokenizing.tokenize` left in a folder. DataError if it is absent, unfinished or damaged (`digests`:
        every byte and every document is checked, not sizes only)."""
        try:
            manifest = seal.check(folder, needed=(INDEX, DOCUMENTS), allowed=_ALLOWED, digests=digests)
            index = plain.parse(seal.text(folder / INDEX, limit=2**20))
            names = sorted(name for name in manifest["files"] if name.endswith(".bin"))
            dtype = np.dtype(index["dtype"])
            documents = _randomly_read(np.load(folder / DOCUMENTS, mmap_mode="r", allow_pickle=False))
            sizes = np.array([manifest["files"][name]["size"] // dtype.itemsize for name in names], dtype=np.int64)
            data = TokenData(
                shards=_Mapped([folder / name for name in names], dtype),
                sizes=sizes,
                documents=documents,
                parts=np.array([[0, len(documents), 0, sizes.sum()]]),
                end_id=index["end_id"],
                vocab_size=index["vocab_size"],
                tokenizer_digest=index["tokenizer_digest"],
                paired=index["paired"],
            )
            data._check_documents(all_of_them=digests)
        except (ValueError, TypeError, LookupError) as problem:
            raise DataError(f"no tokens in {folder}: {problem}; tokenize the text again, elsewhere") from None
        return data

    @property
    def num_documents(self) -> int:
        return int(self._document_ends[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, their ends-of-text included."""
        return int(self._token_ends[-1])

    def document(self, number: int) -> np.ndarray:
        """The tokens of a document, its end-of-text last."""
        begin, _, end = self.spans(np.array([number]))[0].tolist()
        return self.tokens(begin, end)

    def spans(self, numbers: np.ndarray) -> np.ndarray:
        """Where documents begin, where their answers begin, and where they end. DataError if the table is damaged."""
        part = np.searchsorted(self._document_ends, numbers, side="right")
        _, last, low, high = self.parts[part].T
        found = np.asarray(self.documents[numbers - self._document_ends[part] + last])
        begin, answer, end = found.T
        if not (
            (begin <= answer).all() and (answer < end).all() and begin.min() >= 0 and end.max() <= self.sizes.sum()
        ):
            raise DataError(_NOT_FILLED)
        clipped: np.ndarray = np.clip(found, low[:, None], high[:, None])  # a single document may be cut in two
        return clipped

    def stream(self, begin: int, count: int) -> np.ndarray:
        """`count` tokens of the endless stream of these documents, from `begin` on."""
        found, ends = [], self._token_ends
        while count:
            begin %= self.num_tokens
            part = int(np.searchsorted(ends, begin, side="right"))
            taken = min(count, int(ends[part]) - begin)
            at = int(self.parts[part, 3]) - int(ends[part]) + begin
            found.append(self.tokens(at, at + taken))
            begin, count = begin + taken, count - taken
        return found[0] if len(found) == 1 else np.concatenate(found)

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Tokens of a range of the shards laid end to end, as int64. DataError for one that is no token."""
        found, ends = [], self._shard_ends
        while begin < end:
            shard = int(np.searchsorted(ends, begin, side="right"))
            stop = min(end, int(ends[shard]))
            before = int(ends[shard] - self.sizes[shard])
            found.append(self.shards[shard][begin - before : stop - before].astype(np.int64))
            begin = stop
        tokens = found[0] if len(found) == 1 else np.concatenate(found or [np.zeros(0, dtype=np.int64)])
        if len(tokens) and not 0 <= tokens.max() < self.vocab_size - 1:
            raise DataError(f"token {tokens.max()} is not in the vocabulary of {self.vocab_size}: tokenize again")
        return tokens

    def split(self, share: float, *, seed: int = 0) -> tuple["TokenData", "TokenData"]:
        """Documents to learn from, and about a `share` of the tokens, in whole documents, to hold out.

        They are chosen in runs: of one document each, up to 4,096 documents, and of a 4,096th of all beyond that. So a
        part of a run is one range of tokens, found by a search in a small table, however many documents there are.
        A single document is cut in two: its last `share` is held out.
        """
        if not 0 < share < 1:
            raise ValueError(f"the share to hold out must lie in (0, 1), got {share}")
        ((first, last, low, high),) = self.parts.tolist()  # what is split already is not split again
        if last - first == 1:
            if self.paired or high - low < 2:
                raise DataError("a single pair cannot be split: give more of them")
            cut = min(max(low + 1, round(high - share * (high - low))), high - 1)
            return self._of([[0, 1, low, cut]]), self._of([[0, 1, cut, high]])
        runs = self._runs()
        order = generator(seed, _SPLIT).permutation(len(runs))
        sizes = np.cumsum((runs[:, 3] - runs[:, 2])[order])
        nearest = int(np.abs(sizes - share * sizes[-1]).argmin()) + 1
        count = min(nearest, len(order) - 1)
        return self._of(runs[np.sort(order[count:])]), self._of(runs[np.sort(order[:count])])

    def _of(self, parts: Any) -> "TokenData":
        return replace(self, parts=np.array(parts))

    def _runs(self) -> np.ndarray:
        """All documents as parts of about equal numbers. DataError if the table of documents is damaged."""
        count = len(self.documents)
        edges = np.arange(min(count, _RUNS) + 1) * count // min(count, _RUNS)
        begins = np.asarray(self.documents[edges[:-1], 0])
        runs = np.stack((edges[:-1], edges[1:], begins, np.append(begins[1:], self.sizes.sum())), axis=1)
        if (runs[:, 2] >= runs[:, 3]).any():
            raise DataError(_NOT_FILLED)
        return runs

    def _check_documents(self, *, all_of_them: bool) -> None:
        """ValueError unless the documents fill the shards, by the first and the last, or by all of them."""
        if self.documents.dtype != np.int64 or self.documents.shape[1:] != (3,) or not len(self.documents):
            raise ValueError(f"{DOCUMENTS} is damaged: expected three numbers for each document")
        ends = int(self.documents[0, 0]), int(self.documents[-1, 2])
        if ends != (0, int(self.sizes.sum())):
            raise ValueError(_NOT_FILLED)
        for at in range(0, len(self.documents) if all_of_them else 0, _CHECKED):
            begin, answer, end = self.documents[at : at + _CHECKED].T
            follows = np.append(end[:-1] == begin[1:], at == 0 or begin[0] == self.documents[at - 1, 2])
            if not ((begin <= answer).all() and (answer < end).all() and follows.all()):
                raise ValueError(_NOT_FILLED)

    @cached_property
    def _document_ends(self) -> np.ndarray:
        return np.cumsum(self.parts[:, 1] - self.parts[:, 0])

    @cached_property
    def _token_ends(self) -> np.ndarray:
        return np.cumsum(self.parts[:, 3] - self.parts[:, 2])

    @cached_property
    def _shard_ends(self) -> np.ndarray:
        return np.cumsum(self.sizes)


_NOT_FILLED = f"{DOCUMENTS} is damaged: the documents in it do not fill the tokens"


class _Mapped(Sequence[np.ndarray]):
    """Files of tokens, mapped as they are asked for; of very many, those used last."""

    def __init__(self, paths: Sequence[Path], dtype: np.dtype[Any]) -> None:
        self._paths, self._dtype = paths, dtype
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: Any) -> Any:
        if number not in self._maps:
            self._maps[number] = _randomly_read(np.memmap(self._paths[number], dtype=self._dtype, mode="r"))
            if len(self._maps) > _MAPPED:
                self._maps.popitem(last=False)
        self._maps.move_to_end(number)
        return self._maps[number]


def _randomly_read(mapped: np.ndarray) -> np.ndarray:
    """A map whose pages are read one by one, without those beside them; a plain array, which is sliced faster."""
    advice = getattr(mmap, "MADV_RANDOM", None)  # not everywhere
    if isinstance(mapped.base, mmap.mmap) and advice is not None:
        mapped.base.madvise(advice)
    return mapped.view(np.ndarray)
