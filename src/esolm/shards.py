"""Tokens on disk, memory-mapped: documents one after the other, each closed by end-of-text.

    folder/   tokens-00000.bin ...   the tokens, end to end over the files
              documents.npy          where each document begins, where its answer begins (of pairs), and where it ends
              index.json tokenizer.json manifest.json

A text is tokenized once, on all cores, into a folder that is there whole or not at all. It reads no text files.
"""

import os
import re
import shutil
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from esolm import plain, seal
from esolm.corpus import DataError, Meter
from esolm.noise import generator
from esolm.tokenizer import Tokenizer

_INDEX, _DOCUMENTS, _TOKENIZER = "index.json", "documents.npy", "tokenizer.json"
_ALLOWED = re.compile(r"index\.json|documents\.npy|tokenizer\.json|tokens-\d{5}\.bin")
_GROUP = 2**22  # characters of documents held at a time, or one document
_REDRAWN = 0.1  # seconds between drawings of the progress
_SPLIT = 12  # purpose of random numbers


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
        return self.tokens(int(begin), int(end))

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

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Tokens of a range of the shards laid end to end, as int64. DataError for one that is no token."""
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


def tokenize(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    source: str = "",
    fingerprint: str = "",
    shard_tokens: int = 2**27,
    console: Console | None = None,
    meter: Meter | None = None,
) -> TokenData:
    """Tokenize documents into a folder, once: whole or not at all. A folder that holds the same `source` under the same
    tokenizer is used as it is, unless its `fingerprint` is another (`corpus.fingerprint`; empty where it is not known).
    `console` shows the speed and, from a `meter` that the documents move, the time left. DataError for an empty text or
    a folder in the way, OSError for a full disk."""
    if isinstance(documents, str):
        raise DataError("documents must be several texts, got one str: put it into a list")
    records = (("", document) for document in documents)
    named = {"source": source, "fingerprint": fingerprint, "paired": False}
    return _stored(records, tokenizer, folder, named, shard_tokens, _Watch(console, meter))


def tokenize_pairs(
    pairs: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    source: str = "",
    fingerprint: str = "",
    shard_tokens: int = 2**27,
    console: Console | None = None,
    meter: Meter | None = None,
) -> TokenData:
    """The same for prompts and answers. They are tokenized apart, so that a prompt has the tokens it has in use."""
    named = {"source": source, "fingerprint": fingerprint, "paired": True}
    return _stored(pairs, tokenizer, folder, named, shard_tokens, _Watch(console, meter))


_Encoded = tuple[np.ndarray, np.ndarray]  # tokens of a prompt, none if it is no pair, and of a text


def _stored(
    records: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    folder: Path,
    named: dict[str, Any],
    shard_tokens: int,
    watch: "_Watch",
) -> TokenData:
    if tokenizer.end_id is None:
        raise DataError("the tokenizer has no end-of-text, which stands behind every document: choose another")
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
        spans, names = _write_shards(watch.over(tokenized), temporary, shard_tokens)
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


@dataclass(frozen=True)
class _Watch:
    """A line that tells how far tokenizing is."""

    console: Console | None
    meter: Meter | None

    def over(self, documents: Iterator[_Encoded]) -> Iterator[_Encoded]:
        """The documents as they are, counted on the way."""
        columns = SpinnerColumn(), TextColumn("tokenizing · {task.description}"), TimeElapsedColumn()
        count, tokens, began, drawn = 0, 0, time.monotonic(), 0.0
        with Progress(*columns, console=self.console, transient=True, disable=self.console is None) as progress:
            task = progress.add_task("")
            for prompt, text in documents:
                count, tokens, now = count + 1, tokens + len(prompt) + len(text), time.monotonic()
                if now > drawn + _REDRAWN:
                    passed, drawn = max(now - began, 1e-3), now
                    told = f"{count:,} documents, {tokens:,} tokens, {tokens / passed:,.0f} tokens/s"
                    progress.update(task, description=told + self._left(passed))
                yield prompt, text

    def _left(self, passed: float) -> str:
        """The share that is read and the time left, where the size of the text is known."""
        if self.meter is None or not self.meter.total or not self.meter.read:
            return ""
        share = self.meter.read / self.meter.total
        return f", {share:.0%}, {timedelta(seconds=round(passed * (1 - share) / share))} left"


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
