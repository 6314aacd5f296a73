"""Texts to tokens on disk, once, on all cores: what `shards.TokenData` reads.

    .making-data/         shards as they grow
    .making-data.jsonl    what is made of what, then a line for each whole shard

What is killed in the middle goes on with the shards that are whole, and ends with the same bytes. The folder gets its
name when everything is in it, checksummed. One process makes it while others that want the same wait. It reads no text
files.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from esolm import plain, seal
from esolm.corpus import DataError, Meter
from esolm.shards import DOCUMENTS, INDEX, TOKENIZER, TokenData
from esolm.tokenizer import Tokenizer

_GROUP = 2**22  # characters of documents held at a time, or one document
_REDRAWN = 0.1  # seconds between drawings of the progress
_SHARD = 2**28  # tokens of a shard: what a kill costs at most


def tokenize(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    source: str = "",
    fingerprint: str = "",
    shard_tokens: int = _SHARD,
    console: Console | None = None,
    meter: Meter | None = None,
) -> TokenData:
    """Tokenize documents into a folder, once: whole or not at all; an earlier try of the same documents that was killed
    is gone on with. A folder that holds the same `source` under the same tokenizer is used as it is, unless its
    `fingerprint` is another (`corpus.fingerprint`; empty where it is not known).

    `console` shows the speed and, from a `meter` that the documents move, the time left. DataError for an empty text or
    a folder in the way, OSError for a full disk."""
    if isinstance(documents, str):
        raise DataError("documents must be several texts, got one str: put it into a list")
    records = (("", document) for document in documents)
    named = {"source": source, "fingerprint": fingerprint, "paired": False}
    return _stored(records, tokenizer, folder, named, shard_tokens, console, meter)


def tokenize_pairs(
    pairs: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    source: str = "",
    fingerprint: str = "",
    shard_tokens: int = _SHARD,
    console: Console | None = None,
    meter: Meter | None = None,
) -> TokenData:
    """The same for prompts and answers. They are tokenized apart, so that a prompt has the tokens it has in use."""
    named = {"source": source, "fingerprint": fingerprint, "paired": True}
    return _stored(pairs, tokenizer, folder, named, shard_tokens, console, meter)


_Encoded = tuple[np.ndarray, np.ndarray]  # tokens of a prompt, none if it is no pair, and of a text


def _stored(
    records: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    folder: Path,
    named: dict[str, Any],
    shard_tokens: int,
    console: Console | None,
    meter: Meter | None,
) -> TokenData:
    if tokenizer.end_id is None:
        raise DataError("the tokenizer has no end-of-text, which stands behind every document: choose another")
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    ids = {"dtype": dtype, "end_id": tokenizer.end_id, "vocab_size": tokenizer.vocab_size}
    index = {**ids, "tokenizer_digest": tokenizer.digest, **named}
    if folder.exists():
        return _kept(folder, index)
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = folder.with_name(f".making-{folder.name}")
    with _alone(making.with_name(making.name + ".jsonl")) as log:
        if folder.exists():  # another process was first
            Path(os.fsdecode(log.name)).unlink()
            return _kept(folder, index)
        made = _Made.found(making, log, {**index, "shard_tokens": shard_tokens})
        try:
            left = iter(records)
            for _ in islice(left, made.documents):
                pass  # read again, not tokenized again
            watch = _Watch(console, meter, meter.read if meter and made.documents else 0)
            made.go_on(watch.over(_tokenized(left, tokenizer, dtype, made.documents)), shard_tokens)
            made.finish(folder, index, tokenizer)
        finally:
            if not made.digests or folder.exists():
                shutil.rmtree(making, ignore_errors=True)
                Path(log.name).unlink()
    return TokenData.open(folder)


@contextmanager
def _alone(path: Path) -> Iterator[BinaryIO]:
    """The file `path`, open, held by this process alone; waits while another holds it."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        fcntl = None  # type: ignore[assignment]
    while True:
        with path.open("a+b") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            # another may have removed it meanwhile
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                yield file
                return


@dataclass(kw_only=True)
class _Made:
    """Shards that are whole: the log has a line for each, written when its bytes and its documents are on disk."""

    folder: Path
    log: BinaryIO
    documents: int = 0
    tokens: int = 0
    digests: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def found(folder: Path, log: BinaryIO, what: dict[str, Any]) -> "_Made":
        """What an earlier try left of the same documents, or a beginning."""
        made = _Made(folder=folder, log=log)
        log.seek(0)
        first, *lines = [*log.read().split(b"\n")[:-1], b""]
        same = first == json.dumps(what).encode() and (folder / DOCUMENTS).exists()
        if same and all(made._take(line) for line in lines if line):
            return made
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / DOCUMENTS).write_bytes(_header(0))
        log.truncate(0)
        made = _Made(folder=folder, log=log)
        made._note(what)
        return made

    def _take(self, line: bytes) -> bool:
        """Count a shard in, if it is there as it was made."""
        entry = json.loads(line)
        path = self.folder / f"tokens-{len(self.digests):05d}.bin"
        if not path.exists() or _digest(path) != entry["sha256"]:
            return False
        self.digests[path.name] = entry["sha256"]
        self.documents, self.tokens = entry["documents"], entry["tokens"]
        return (self.folder / DOCUMENTS).stat().st_size >= len(_header(0)) + 24 * self.documents

    def go_on(self, documents: Iterator[_Encoded], shard_tokens: int) -> None:
        """Write the documents that are left, a new shard begun after `shard_tokens`."""
        with (self.folder / DOCUMENTS).open("r+b") as table:
            table.truncate(len(_header(0)) + 24 * self.documents)  # of a shard that was not whole
            table.seek(0, os.SEEK_END)
            while (first := next(documents, None)) is not None:
                self._write(chain([first], documents), table, self.tokens + shard_tokens)
            if not self.documents:
                raise DataError("there is no text to tokenize")
            table.seek(0)
            table.write(_header(self.documents))

    def _write(self, documents: Iterator[_Encoded], table: BinaryIO, full: int) -> None:
        """One shard."""
        name, digest = f"tokens-{len(self.digests):05d}.bin", hashlib.sha256()
        count, begin = self.documents, self.tokens
        with (self.folder / name).open("wb") as file:
            for prompt, text in documents:
                content = prompt.tobytes() + text.tobytes()
                file.write(content)
                digest.update(content)
                answer = begin + len(prompt)
                table.write(np.array((begin, answer, answer + len(text)), dtype="<i8").tobytes())
                count, begin = count + 1, answer + len(text)
                if begin >= full:
                    break
        table.flush()
        for path in (self.folder / name, self.folder / DOCUMENTS, self.folder):
            seal.sync(path)
        self.documents, self.tokens, self.digests[name] = count, begin, digest.hexdigest()
        self._note({"documents": count, "tokens": begin, "sha256": self.digests[name]})

    def _note(self, entry: dict[str, Any]) -> None:
        self.log.write(json.dumps(entry).encode() + b"\n")
        self.log.flush()
        os.fsync(self.log.fileno())

    def finish(self, folder: Path, index: dict[str, Any], tokenizer: Tokenizer) -> None:
        """Seal what is made and give it its name."""
        tokenizer.save(self.folder / TOKENIZER)
        counts = {"num_documents": self.documents, "num_tokens": self.tokens}
        (self.folder / INDEX).write_text(plain.render(index | counts), encoding="utf-8")
        (self.folder / seal.MANIFEST).unlink(missing_ok=True)
        seal.seal(self.folder, [*self.digests, DOCUMENTS, TOKENIZER, INDEX], step=0, known=self.digests)
        for path in self.folder.iterdir():
            if path.name not in (*self.digests, DOCUMENTS, TOKENIZER, INDEX, seal.MANIFEST):
                path.unlink()  # of a shard that was not whole, of a try with more documents
        self.folder.rename(folder)
        seal.sync(folder.parent)


def _header(count: int) -> bytes:
    """The beginning of a file of numpy for `count` documents: 128 bytes, however many they are."""
    shape = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({count}, 3), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + shape.ljust(117).encode() + b"\n"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kept(folder: Path, index: dict[str, Any]) -> TokenData:
    """The tokens already in a folder, if they are those of this source and tokenizer."""
    data = TokenData.open(folder)
    there = {"fingerprint": "", **plain.parse(seal.text(folder / INDEX, limit=2**20))}
    remedy = "remove it, or choose another folder"
    if index["fingerprint"] and there["fingerprint"] and index["fingerprint"] != there["fingerprint"]:
        raise DataError(f"the text has changed since it was tokenized into {folder}: {remedy}")
    for name in index.keys() - {"fingerprint"}:
        if there.get(name) != index[name]:
            what = "text" if name in ("source", "paired") else "tokenizer"
            raise DataError(f"{folder} holds the tokens of another {what}: {remedy}")
    return data


def _tokenized(records: Iterator[tuple[str, str]], tokenizer: Tokenizer, dtype: str, first: int) -> Iterator[_Encoded]:
    """Tokens of prompts and texts, end-of-text last; tokenized many at a time, on all cores."""
    end = np.array([tokenizer.end_id], dtype=dtype)
    for group in _groups(records, first):
        found = tokenizer.encode_arrays(chain.from_iterable(group), dtype)
        for prompt, text in zip(found, found, strict=True):
            yield prompt, np.concatenate((text, end))


def _groups(records: Iterator[tuple[str, str]], first: int = 0) -> Iterator[list[tuple[str, str]]]:
    """Records, the first of which is number `first`, in groups of about `_GROUP` characters."""
    group: list[tuple[str, str]] = []
    size = 0
    for number, (prompt, text) in enumerate(records, first):
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
    before: int = 0  # bytes that were read before it began

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
        if self.meter is None or not self.meter.total or self.meter.read <= self.before:
            return ""
        read, total = self.meter.read, self.meter.total
        left = passed * (total - read) / (read - self.before)
        return f", {read / total:.0%}, {timedelta(seconds=round(left))} left"
