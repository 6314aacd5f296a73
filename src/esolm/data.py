"""Tokens on disk, memory-mapped, and the batches that training takes from them: a pure function of (seed, step).

    folder/   tokens-00000.bin ...   documents one after the other, each closed by end-of-text
              documents.npy          where each begins and, for pairs, where its answer begins
              index.json tokenizer.json manifest.json

A row of a batch is a window of the endless stream of documents, or one prompt with its answer. Nothing here has state,
so a resumed run needs a step number only. It reads no text files.
"""

import os
import re
import shutil
import time
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
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

_INDEX, _DOCUMENTS, _TOKENIZER = "index.json", "documents.npy", "tokenizer.json"
_ALLOWED = re.compile(r"index\.json|documents\.npy|tokenizer\.json|tokens-\d{5}\.bin")
_GROUP = 2**22  # characters of documents held at a time, or one document
_ROUNDS = 8  # four leave neighbours of small ranges together too often
_REDRAWN = 0.1  # seconds between drawings of the progress
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
            names = sorted(name for name in manifest["files"] if name.endswith(".bin"))
            data = TokenData(
                shards=[np.memmap(folder / name, dtype=index["dtype"], mode="r") for name in names],
                spans=np.load(folder / _DOCUMENTS, mmap_mode="r", allow_pickle=False),
                end_id=index["end_id"],
                vocab_size=index["vocab_size"],
                tokenizer_digest=index["tokenizer_digest"],
                paired=index["paired"],
            )
            data._check_spans()
        except (ValueError, TypeError, LookupError) as problem:
            raise DataError(f"no tokens in {folder}: {problem}; tokenize the text again, elsewhere") from None
        return data

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
            return replace(self, spans=np.array(parts[0])), replace(self, spans=np.array(parts[1]))
        order = generator(seed, _SPLIT).permutation(len(self.spans))
        sizes = np.cumsum((self.spans[:, 2] - self.spans[:, 0])[order])
        nearest = int(np.abs(sizes - share * sizes[-1]).argmin()) + 1
        count = min(nearest, len(order) - 1)
        learned, held_out = (self.spans[np.sort(part)] for part in (order[count:], order[:count]))
        return replace(self, spans=learned), replace(self, spans=held_out)

    def _check_spans(self) -> None:
        """ValueError unless the documents follow each other and fill the shards."""
        begin, answer, end = self.spans.T
        sound = len(begin) and begin[0] == 0 and end[-1] == sum(map(len, self.shards))
        if not (sound and (begin <= answer).all() and (answer < end).all() and (begin[1:] == end[:-1]).all()):
            raise ValueError(f"{_DOCUMENTS} is damaged: the documents in it do not fill the tokens")

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
    its right, and a warning says how many are.
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
            return [self._pair(place) for place in moved]
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
            found.append(self.data._tokens(first + inside, first + inside + taken))
            begin, count = begin + taken, count - taken
        return np.concatenate(found)

    def _pair(self, place: int) -> "_Row":
        """Tokens of a pair and how many of them are its prompt."""
        begin, answer, end = (int(p) for p in self.data.spans[place])
        end = min(end, answer + self.length)
        begin = max(begin, end - self.length)
        return self.data._tokens(begin, end), answer - begin

    def _collected(self, rows: "list[_Row]") -> Batch:
        tokens = np.full((len(rows), self.length), self.data.end_id)
        places = np.arange(self.length)
        for row, (found, _) in zip(tokens, rows, strict=True):
            row[: len(found)] = found
        given = places < np.array([prompt for _, prompt in rows])[:, None]
        valid = places < np.array([len(found) for found, _ in rows])[:, None]
        return Batch(tokens=torch.from_numpy(tokens), given=torch.from_numpy(given), valid=torch.from_numpy(valid))


_Row = tuple[np.ndarray, int]  # tokens, and how many of them are a prompt
_Encoded = tuple[np.ndarray, np.ndarray]  # tokens of a prompt, none if it is no pair, and of a text


def tokenize(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    source: str = "",
    fingerprint: str = "",
    shard_tokens: int = 2**27,
    console: Console | None = None,
) -> TokenData:
    """Tokenize documents into a folder, once: whole or not at all. A folder that holds the same `source` under the same
    tokenizer is used as it is, unless its `fingerprint` is another (`corpus.fingerprint`; empty where it is not known).
    DataError for an empty text or a folder in the way, OSError for a full disk."""
    if isinstance(documents, str):
        raise DataError("documents must be several texts, got one str: put it into a list")
    records = (("", document) for document in documents)
    named = {"source": source, "fingerprint": fingerprint, "paired": False}
    return _stored(records, tokenizer, folder, named, shard_tokens, console)


def tokenize_pairs(
    pairs: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    source: str = "",
    fingerprint: str = "",
    shard_tokens: int = 2**27,
    console: Console | None = None,
) -> TokenData:
    """The same for prompts and answers. They are tokenized apart, so that a prompt has the tokens it has in use."""
    named = {"source": source, "fingerprint": fingerprint, "paired": True}
    return _stored(pairs, tokenizer, folder, named, shard_tokens, console)


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


def _stored(
    records: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    folder: Path,
    named: dict[str, Any],
    shard_tokens: int,
    console: Console | None,
) -> TokenData:
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    ids = {"dtype": dtype, "end_id": tokenizer.end_id, "vocab_size": tokenizer.vocab_size}
    index = {**ids, "tokenizer_digest": tokenizer.digest, **named}
    if folder.exists():
        return _kept(folder, index)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".making-{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        tokenized = _tokenized(iter(records), tokenizer, dtype)
        spans, names = _write_shards(_watched(tokenized, console), temporary, shard_tokens)
        if not len(spans):
            raise DataError("there is no text to tokenize")
        np.save(temporary / _DOCUMENTS, spans)
        tokenizer.save(temporary / _TOKENIZER)
        counts = {"num_documents": len(spans), "num_tokens": int(spans[-1, 2])}
        (temporary / _INDEX).write_text(plain.render(index | counts), encoding="utf-8")
        seal.seal(temporary, [*names, _DOCUMENTS, _TOKENIZER, _INDEX], step=0)
        return _moved(temporary, folder, index)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _moved(temporary: Path, folder: Path, index: dict[str, Any]) -> TokenData:
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        return _kept(folder, index)  # another process was first
    seal.sync(folder.parent)
    return TokenData.open(folder)


def _kept(folder: Path, index: dict[str, Any]) -> TokenData:
    """The tokens already in a folder, if they are those of this source and tokenizer."""
    data = TokenData.open(folder)
    there = {"fingerprint": "", **plain.parse(seal.text(folder / _INDEX, limit=2**20))}
    remedy = "remove it, or choose another folder"
    if index["fingerprint"] and there["fingerprint"] and index["fingerprint"] != there["fingerprint"]:
        raise DataError(f"the text has changed since it was tokenized into {folder}: {remedy}")
    for name in index.keys() - {"fingerprint"}:
        if there.get(name) != index[name]:
            what = "text" if name in ("source", "paired") else "tokenizer"
            raise DataError(f"{folder} holds the tokens of another {what}: {remedy}")
    return data


def _tokenized(records: Iterator[tuple[str, str]], tokenizer: Tokenizer, dtype: str) -> Iterator[_Encoded]:
    """Tokens of prompts and texts, end-of-text last; tokenized many at a time, on all cores."""
    end = np.array([tokenizer.end_id], dtype=dtype)
    for group in _groups(records):
        found = tokenizer.encode_arrays(chain.from_iterable(group), dtype)
        for prompt, text in zip(found, found, strict=True):
            yield prompt, np.concatenate((text, end))


def _groups(records: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Records in groups of about `_GROUP` characters."""
    group: list[tuple[str, str]] = []
    size = 0
    for number, (prompt, text) in enumerate(records):
        if not text:
            raise DataError(f"text {number} is empty: leave it out")
        group.append((prompt, text))
        size += len(prompt) + len(text)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _watched(documents: Iterator[_Encoded], console: Console | None) -> Iterator[_Encoded]:
    """The documents as they are, with a line that counts them."""
    columns = SpinnerColumn(), TextColumn("tokenizing · {task.description}"), TimeElapsedColumn()
    count, tokens, began, drawn = 0, 0, time.monotonic(), 0.0
    with Progress(*columns, console=console, transient=True, disable=console is None) as progress:
        task = progress.add_task("")
        for prompt, text in documents:
            count, tokens, now = count + 1, tokens + len(prompt) + len(text), time.monotonic()
            if now > drawn + _REDRAWN:
                rate, drawn = tokens / max(now - began, 1e-3), now
                progress.update(task, description=f"{count:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s")
            yield prompt, text


def _write_shards(documents: Iterator[_Encoded], folder: Path, shard_tokens: int) -> tuple[np.ndarray, list[str]]:
    """Spans of the documents and names of the files that hold them, a new one begun after `shard_tokens`."""
    spans = array("q")  # 24 bytes a document: there may be very many
    names: list[str] = []
    begin = 0
    while (first := next(documents, None)) is not None:
        names.append(f"tokens-{len(names):05d}.bin")
        full = begin + shard_tokens
        with (folder / names[-1]).open("wb") as file:
            for prompt, text in chain([first], documents):
                file.write(prompt.tobytes() + text.tobytes())
                answer = begin + len(prompt)
                spans.extend((begin, answer, answer + len(text)))
                begin = answer + len(text)
                if begin >= full:
                    break
    return np.array(spans, dtype=np.int64).reshape(-1, 3), names
