"""Tokens on disk, memory-mapped, and the batches that training takes from them: a pure function of (seed, step).

    folder/   tokens-00000.bin ...   documents one after the other, each closed by end-of-text
              documents.npy          where each begins and, for pairs, where its answer begins
              index.json manifest.json

A row of a batch is a window of the endless stream of documents, or one prompt with its answer. Nothing here has state,
so a resumed run needs a step number only. It reads no text files.
"""

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from esolm import plain, seal
from esolm.algorithms.algorithm import Batch
from esolm.corpus import DataError
from esolm.noise import generator
from esolm.tokenizer import Tokenizer

_INDEX, _DOCUMENTS = "index.json", "documents.npy"
_ALLOWED = re.compile(r"index\.json|documents\.npy|tokens-\d{5}\.bin")
_PIECE = 2**18  # characters tokenized at a time: a document may be one huge file
_TOGETHER = 64  # documents, and pieces of them, tokenized together
_CUT = re.compile(r"\n(?=\S)")  # where a text may be cut and its byte-level tokens stay the same
_OFFSETS, _WINDOWS, _SPLIT = 10, 11, 12  # purposes of random numbers


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenData:
    """Documents as tokens: `spans[i]` is where document `i` begins, where its answer begins (its own beginning, if it
    is no pair) and where it ends (its end-of-text included), in the shards laid end to end."""

    shards: Sequence[np.ndarray]
    spans: np.ndarray  # [document, 3]
    end_id: int
    vocab_size: int
    tokenizer_digest: str
    paired: bool = False

    @staticmethod
    def open(folder: Path, *, digests: bool = False) -> "TokenData":
        """What `tokenize` left in a folder. DataError if it is absent, unfinished or damaged (`digests`: every byte is
        checked, not sizes only)."""
        try:
            manifest = seal.check(folder, needed=(_INDEX, _DOCUMENTS), allowed=_ALLOWED, digests=digests)
            index = plain.parse(seal.text(folder / _INDEX, limit=2**20))
        except ValueError as problem:
            raise DataError(f"no tokens in {folder}: {problem}; tokenize the text again") from None
        names = sorted(name for name in manifest["files"] if name.endswith(".bin"))
        return TokenData(
            shards=[np.memmap(folder / name, dtype=index["dtype"], mode="r") for name in names],
            spans=np.load(folder / _DOCUMENTS, mmap_mode="r", allow_pickle=False),
            end_id=index["end_id"],
            vocab_size=index["vocab_size"],
            tokenizer_digest=index["tokenizer_digest"],
            paired=index["paired"],
        )

    @property
    def num_documents(self) -> int:
        return len(self.spans)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, their ends-of-text included."""
        return int((self.spans[:, 2] - self.spans[:, 0]).sum())

    def document(self, number: int) -> np.ndarray:
        """The tokens of a document, its end-of-text last."""
        begin, _, end = self.spans[number]
        return self._tokens(int(begin), int(end))

    def split(self, share: float, *, seed: int = 0) -> tuple["TokenData", "TokenData"]:
        """Documents to learn from, and about a `share` of the tokens, in whole documents, to hold out.

        A single document is cut in two: its last `share` is held out.
        """
        if not 0 < share < 1:
            raise ValueError(f"the share to hold out must lie in (0, 1), got {share}")
        if len(self.spans) == 1:
            begin, answer, end = (int(place) for place in self.spans[0])
            if self.paired or end - begin < 2:
                raise DataError("a single pair cannot be split: give more of them")
            cut = min(max(begin + 1, round(end - share * (end - begin))), end - 1)
            parts = [(begin, min(answer, cut), cut)], [(cut, cut, end)]
            return self._with(np.array(parts[0])), self._with(np.array(parts[1]))
        order = generator(seed, _SPLIT).permutation(len(self.spans))
        sizes = (self.spans[:, 2] - self.spans[:, 0])[order]
        wanted = share * sizes.sum()
        count = int(np.abs(np.cumsum(sizes) - wanted).argmin()) + 1  # nearest to the share
        count = min(count, len(order) - 1)
        return self._with(self.spans[np.sort(order[count:])]), self._with(self.spans[np.sort(order[:count])])

    def _with(self, spans: np.ndarray) -> "TokenData":
        return replace(self, spans=spans)

    def _tokens(self, begin: int, end: int) -> np.ndarray:
        """Tokens of a range of the shards laid end to end, as int64."""
        found, at = [], 0
        for shard in self.shards:
            low, high = max(begin - at, 0), min(end - at, len(shard))
            if low < high:
                found.append(np.asarray(shard[low:high], dtype=np.int64))
            at += len(shard)
        tokens = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
        if len(tokens) and not 0 <= tokens.max() < self.vocab_size - 1:
            raise DataError(f"token {tokens.max()} is not in the vocabulary of {self.vocab_size}: tokenize again")
        return tokens


class Loader:
    """Batches of `length` tokens. Row `r` of step `s` is a function of the seed, `s` and `r` alone.

    Of documents: windows of the stream, each once an epoch in an order of the epoch's own, from a grid that is moved
    every epoch. Of pairs: one pair a row, its prompt given, padded; a long prompt is cut on its left, a long answer on
    its right.
    """

    def __init__(self, data: TokenData, *, length: int, seed: int = 0) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.data, self.length, self.seed = data, length, seed
        sizes = data.spans[:, 2] - data.spans[:, 0]
        self._ends = np.cumsum(sizes)  # of each document, in the stream
        total = int(self._ends[-1]) if len(sizes) else 0
        if not data.paired and total < length:
            raise DataError(
                f"the text has {total} tokens, fewer than one window of {length}: give more, or a length of {total}"
            )
        self.num_rows = len(sizes) if data.paired else total // length
        """Rows of an epoch."""

    def batch(self, step: int, start: int, stop: int, total: int) -> Batch:
        """Rows `start` to `stop` of the global batch of `total` rows at a step."""
        return self._collected([self._row(step * total + row) for row in range(start, stop)])

    def windows(self, batch: int) -> Iterator[Batch]:
        """Every document once, in order: windows on a fixed grid (the last one padded), or pairs."""
        count = self.num_rows if self.data.paired else -(-int(self._ends[-1]) // self.length)
        for at in range(0, count, batch):
            rows = range(at, min(at + batch, count))
            yield self._collected([self._pair(row) if self.data.paired else self._window(row) for row in rows])

    def _row(self, number: int) -> tuple[np.ndarray, int]:
        epoch, place = divmod(number, self.num_rows)
        place = permuted(place, self.num_rows, self.seed, epoch)
        if self.data.paired:
            return self._pair(place)
        offset = int(generator(self.seed, _OFFSETS, epoch).integers(int(self._ends[-1])))
        return self._stream(offset + place * self.length, self.length), 0

    def _window(self, place: int) -> tuple[np.ndarray, int]:
        begin = place * self.length
        return self._stream(begin, min(self.length, int(self._ends[-1]) - begin)), 0

    def _stream(self, begin: int, count: int) -> np.ndarray:
        """`count` tokens of the endless stream of documents from `begin` on."""
        found, total = [], int(self._ends[-1])
        while count:
            begin %= total
            document = int(np.searchsorted(self._ends, begin, side="right"))
            first, _, last = (int(place) for place in self.data.spans[document])
            inside = begin - (int(self._ends[document]) - (last - first))
            taken = min(count, last - first - inside)
            found.append(self.data._tokens(first + inside, first + inside + taken))
            begin, count = begin + taken, count - taken
        return np.concatenate(found)

    def _pair(self, place: int) -> tuple[np.ndarray, int]:
        """Tokens of a pair and how many of them are its prompt."""
        begin, answer, end = (int(p) for p in self.data.spans[place])
        end = min(end, answer + self.length)
        begin = max(begin, end - self.length)
        return self.data._tokens(begin, end), answer - begin

    def _collected(self, rows: list[tuple[np.ndarray, int]]) -> Batch:
        tokens = np.full((len(rows), self.length), self.data.end_id)
        places = np.arange(self.length)
        for row, (found, _) in zip(tokens, rows, strict=True):
            row[: len(found)] = found
        given = places < np.array([prompt for _, prompt in rows])[:, None]
        valid = places < np.array([len(found) for found, _ in rows])[:, None]
        return Batch(tokens=torch.from_numpy(tokens), given=torch.from_numpy(given), valid=torch.from_numpy(valid))


def tokenize(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    source: str = "",
    shard_tokens: int = 2**27,
    console: Console | None = None,
) -> TokenData:
    """Tokenize documents into a folder, once: whole or not at all. A folder that holds the same `source` under the same
    tokenizer is used as it is. DataError for an empty text or a folder in the way, OSError for a full disk."""
    records = (("", document) for document in documents)
    return _stored(records, tokenizer, folder, source, shard_tokens, console, paired=False)


def tokenize_pairs(
    pairs: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    source: str = "",
    shard_tokens: int = 2**27,
    console: Console | None = None,
) -> TokenData:
    """The same for prompts and answers. They are tokenized apart, so that a prompt has the tokens it has in use."""
    return _stored(pairs, tokenizer, folder, source, shard_tokens, console, paired=True)


def permuted(place: int, count: int, *key: int) -> int:
    """Where a keyed permutation of `range(count)` sends `place`: a Feistel network on the next power of four, walked
    until it lands inside. No table is made."""
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    rounds = generator(*key, _WINDOWS).integers(1, 2**62, size=4)
    while True:
        left, right = place >> half, place & ((1 << half) - 1)
        for constant in rounds.tolist():
            left, right = right, left ^ _mixed(right + constant, half)
        place = left << half | right
        if place < count:
            return place


def _mixed(value: int, bits: int) -> int:
    """`bits` well-mixed bits of an integer (the finalizer of splitmix64)."""
    value &= 2**64 - 1
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 2**64 - 1
    return (value ^ value >> 31) & ((1 << bits) - 1)


def _stored(
    records: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    folder: Path,
    source: str,
    shard_tokens: int,
    console: Console | None,
    *,
    paired: bool,
) -> TokenData:
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    index = {
        "dtype": dtype,
        "end_id": tokenizer.end_id,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_digest": tokenizer.digest,
        "paired": paired,
        "source": source,
    }
    if folder.exists():
        return _kept(folder, index)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".making-{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        tokenized = _tokenized(iter(records), tokenizer, dtype)
        spans, names = _write_shards(_watched(tokenized, console), temporary, shard_tokens)
        if not spans:
            raise DataError("there is no text to tokenize")
        np.save(temporary / _DOCUMENTS, np.array(spans))
        (temporary / _INDEX).write_text(plain.render(index), encoding="utf-8")
        seal.seal(temporary, [*names, _DOCUMENTS, _INDEX], step=0)
        temporary.rename(folder)
        seal.sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return TokenData.open(folder)


def _kept(folder: Path, index: dict[str, Any]) -> TokenData:
    """The tokens already in a folder, if they are those of this source and tokenizer."""
    data = TokenData.open(folder)
    there = plain.parse(seal.text(folder / _INDEX, limit=2**20))
    for name, value in index.items():
        if there.get(name) != value:
            what = "tokenizer" if name in ("tokenizer_digest", "vocab_size", "end_id", "dtype") else "text"
            raise DataError(f"{folder} holds the tokens of another {what}: remove it, or choose another folder")
    return data


def _tokenized(
    records: Iterator[tuple[str, str]], tokenizer: Tokenizer, dtype: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens of prompts and texts, end-of-text last; tokenized many at a time, on all cores."""
    end = np.array([tokenizer.end_id], dtype=dtype)
    while group := list(islice(records, _TOGETHER)):
        pieces = [[prompt, *_pieces(text)] for prompt, text in group]
        flat = iter(_encoded([piece for parts in pieces for piece in parts], tokenizer, dtype))
        for parts in pieces:
            prompt, *text = islice(flat, len(parts))
            yield prompt, np.concatenate((*text, end))


def _encoded(texts: list[str], tokenizer: Tokenizer, dtype: str) -> Iterator[np.ndarray]:
    for at in range(0, len(texts), _TOGETHER):
        for ids in tokenizer.encode_batch(texts[at : at + _TOGETHER]):
            yield np.array(ids, dtype=dtype)


def _pieces(text: str) -> Iterator[str]:
    """A text cut into pieces of about `_PIECE` characters where no token of a byte-level BPE can lie across."""
    at = 0
    while cut := _CUT.search(text, at + _PIECE):
        yield text[at : cut.end()]
        at = cut.end()
    yield text[at:]


def _watched(
    documents: Iterator[tuple[np.ndarray, np.ndarray]], console: Console | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The documents as they are, with a line that counts them."""
    columns = SpinnerColumn(), TextColumn("tokenizing · {task.description}"), TimeElapsedColumn()
    count, tokens, began = 0, 0, time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=console is None) as progress:
        task = progress.add_task("")
        for prompt, text in documents:
            count, tokens = count + 1, tokens + len(prompt) + len(text)
            rate = tokens / max(time.monotonic() - began, 1e-3)
            progress.update(task, description=f"{count:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s")
            yield prompt, text


def _write_shards(
    documents: Iterator[tuple[np.ndarray, np.ndarray]], folder: Path, shard_tokens: int
) -> tuple[list[tuple[int, int, int]], list[str]]:
    """Spans of the documents and names of the files that hold them, a new one begun after `shard_tokens`."""
    spans: list[tuple[int, int, int]] = []
    names: list[str] = []
    begin = 0
    while (first := next(documents, None)) is not None:
        names.append(f"tokens-{len(names):05d}.bin")
        full = begin + shard_tokens
        with (folder / names[-1]).open("wb") as file:
            for prompt, text in chain([first], documents):
                file.write(prompt.tobytes() + text.tobytes())
                answer = begin + len(prompt)
                spans.append((begin, answer, answer + len(text)))
                begin = answer + len(text)
                if begin >= full:
                    break
    return spans, names
