"""Documents and prompt/answer pairs from files, folders, JSON, Parquet, compressed or not, and named data sets.

    documents("books/")      every file below, sorted        documents("hf:roneneldan/TinyStories")     streamed
    documents("play.txt")    one document, or one between form feeds     pairs("qa.jsonl", prompt="question")

Everything is read as it is asked for, so a file may be larger than memory if its documents are not; only an array of
JSON, and Parquet packed once more, are held whole. A text is what the file says: line breaks stay as they are. It
yields text; tokens are another file's.
"""

import bz2
import codecs
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from esolm.plain import nearest

PAGE = "\f"  # between documents of one file
_PACKED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_JSON = (".jsonl", ".json", ".ndjson")
_ARCHIVES = (".tar", ".tgz", ".zip", ".7z", ".rar")  # a tar of texts would pass for a text, its headers and all
_HUB = "hf:"
_CHUNK = 2**20  # bytes read at a time


class DataError(ValueError):
    """A text is missing, empty, damaged or in another form. The message names the place and what to do."""


class Meter:
    """How far a source has been read, in bytes as they lie on disk. `total` is None for a named data set."""

    def __init__(self, source: str | Path) -> None:
        self.read = 0
        self.total = None if _is_named(source) else sum(path.stat().st_size for path in _paths(Path(source)))


def documents(
    source: str | Path, *, field: str = "text", separator: str | None = None, meter: Meter | None = None
) -> Iterator[str]:
    """Texts of a source, empty ones left out.

    `field` is the text's name in JSON, Parquet and data sets; `separator` stands between the documents of a plain file
    (form feeds, if None). Line breaks around a separator belong to it. `meter` is told how far the files are read.
    DataError for a source without text, and for one that is absent or broken.
    """
    if separator == "":
        raise ValueError("separator must not be empty: leave it out for form feeds")
    found = False
    for (text,) in _records(source, (field,), separator or PAGE, meter):
        if text.strip():
            found = True
            yield text
    if not found:
        raise DataError(f"there is no text in {source}: every document is empty; give one that has words")


def pairs(
    source: str | Path, *, prompt: str = "prompt", answer: str = "answer", meter: Meter | None = None
) -> Iterator[tuple[str, str]]:
    """Prompts and answers of JSON, Parquet or a data set, pairs with an empty answer left out. DataError."""
    found = False
    for question, reply in _records(source, (prompt, answer), None, meter):
        if reply.strip():
            found = True
            yield question, reply
    if not found:
        raise DataError(f"there is no answer in {source}: every one is empty")


def extras(source: str | Path, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """What each JSON record of a source says under `names`, whatever it is; nothing of other forms. DataError."""
    for path in () if _is_named(source) else _paths(Path(source)):
        with _named(path), _opened(path) as (_, file):
            if (kind := _kind(path)) in _JSON:
                for _, record in _json(file, path, array=kind == ".json"):
                    yield {name: record[name] for name in names if isinstance(record, dict) and name in record}


SHIPPED = {
    "shakespeare": "classics/shakespeare.txt.xz",
    "kjv": "classics/kjv.txt.xz",
    "classics": "classics",
}
"""Texts that come with the package, in the public domain: the plays and poems, the King James Bible, both."""


def shipped(name: str = "shakespeare") -> Path:
    """The file or folder of a corpus that comes with the package. DataError if there is none of that name."""
    if name not in SHIPPED:
        raise DataError(f"no corpus {name!r} comes with esolm{nearest(name, SHIPPED)}; there is {', '.join(SHIPPED)}")
    return Path(str(files("esolm") / "assets")) / SHIPPED[name]


def fingerprint(source: str | Path) -> str:
    """What tells that a source has changed: a digest of its files' names, sizes, and first and last mebibyte.

    Empty for a named data set, and for files that are not there, since there is nothing to compare.
    """
    path = Path(source)
    if _is_named(source) or not os.path.lexists(path):
        return ""
    digest = hashlib.sha256()
    for file in _paths(path):
        name = str(file.relative_to(path)) if file != path else file.name
        with _named(file), file.open("rb") as content:
            size = os.fstat(content.fileno()).st_size
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
            digest.update(content.read(_CHUNK))
            content.seek(max(0, size - _CHUNK))
            digest.update(content.read(_CHUNK))
    return digest.hexdigest()


@runtime_checkable
class _Reader(Protocol):
    """What is needed of a file of bytes."""

    def read(self, size: int = -1, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def __iter__(self) -> Iterator[bytes]: ...


def _records(
    source: str | Path, names: tuple[str, ...], separator: str | None, meter: Meter | None
) -> Iterator[tuple[str, ...]]:
    """The named fields of every record; a plain text has one field, itself."""
    if _is_named(source):
        yield from _data_set(str(source)[len(_HUB) :], names)
        return
    done = 0
    for path in _paths(Path(source)):
        with _named(path), _opened(path) as (raw, file):
            for record in _of_file(file, path, names, separator):
                if meter is not None:
                    meter.read = done + raw.tell()
                yield record
            done += raw.seek(0, io.SEEK_END)
    if meter is not None:
        meter.read = done


def _of_file(file: _Reader, path: Path, names: tuple[str, ...], separator: str | None) -> Iterator[tuple[str, ...]]:
    """The records of one file, whose form its name tells."""
    kind = _kind(path)
    if kind in _ARCHIVES:
        raise DataError(f"{path} is an archive of files: unpack it, and give the folder")
    if kind == ".parquet":
        yield from _parquet(file, path, names)
    elif kind in _JSON:
        for place, record in _json(file, path, array=kind == ".json"):
            yield _fields(record, names, place)
    elif separator is None:
        raise DataError(f"{path} is plain text; prompts and answers come as JSON lines or Parquet")
    else:
        yield from ((text,) for text in _separated(_decoded(file, path), separator))


def _kind(path: Path) -> str:
    """The ending of a file's name, whatever packs it."""
    return next((end.lower() for end in reversed(path.suffixes) if end.lower() not in (*_PACKED, ".zst")), "")


def _is_named(source: str | Path) -> bool:
    return str(source).startswith(_HUB)


def _paths(path: Path) -> list[Path]:
    """A file, or every file below a folder that is not hidden, sorted. Links to folders are not followed."""
    with _named(path):
        if path.is_file():
            return [path]
        if path.is_dir():
            found = sorted(_below(path))
            if not found:
                raise DataError(f"there is no file in the folder {path}: give one that holds texts")
            return found
        if path.exists():
            raise DataError(f"{path} is neither a file nor a folder: put the text into a file, which can be read twice")
        near = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(f"there is no file {path}{nearest(path.name, near)}")


def _below(path: Path) -> Iterator[Path]:
    """Files below a folder that are not hidden. A link that leads nowhere is among them, since its text is missing."""

    def refuse(problem: OSError) -> None:
        raise DataError(f"cannot read {problem.filename}: {problem.strerror}")

    for folder, inner, names in os.walk(path, onerror=refuse):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            if file.is_file() or not file.exists():
                yield file


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or forbidden file raises into a DataError that names it."""
    try:
        yield
    except Exception as problem:
        damage: list[type[Exception]] = [OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError]
        for module, error in (("zstandard", "ZstdError"), ("pyarrow", "ArrowException")):
            if (loaded := sys.modules.get(module)) is not None:
                damage.append(getattr(loaded, error))
        if not isinstance(problem, tuple(damage)):
            raise
        told = problem.strerror if isinstance(problem, OSError) and problem.strerror else problem
        raise DataError(f"cannot read {path}: {told}") from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[io.FileIO, Any]]:
    """The bytes of a file as they lie on disk, and the same unpacked as they are read."""
    suffix = path.suffix.lower()
    with path.open("rb", buffering=0) as raw:
        buffered = io.BufferedReader(raw, _CHUNK)
        if suffix == ".zst":
            yield raw, io.BufferedReader(_Zstandard(buffered, path), _CHUNK)
        else:
            unpacked: Any = _PACKED.get(suffix, lambda file: file)
            yield raw, unpacked(buffered)


class _Zstandard(io.RawIOBase):
    """Frames of a .zst file, one after the other. The library's own reader takes a file that is cut off for whole."""

    def __init__(self, file: _Reader, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path} needs zstandard: pip install 'esolm[data]'") from None
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            packed = self._packed or self._file.read(2**14)
            if not packed and self._frame is not None:
                raise EOFError("the file is cut off")
            if not packed:
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(packed))
            self._packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _decoded(file: _Reader, path: Path) -> Iterator[str]:
    """The text of a file, a chunk at a time."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    end = 0
    while True:
        chunk = file.read(_CHUNK)
        end += len(chunk)
        try:
            yield decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as problem:
            start = end - len(problem.object) + problem.start  # what is decoded is the end of what was read
            raise DataError(_not_utf8(str(path), problem.object[problem.start], start)) from None
        if not chunk:
            return


def _separated(chunks: Iterable[str], separator: str) -> Iterator[str]:
    """Documents between separators, without the line breaks that stand around a separator."""
    held: list[str] = []  # of the document that is being read
    rest, many = "", False
    for chunk in chunks:
        *whole, last = (rest + chunk).split(separator)
        for text in whole:
            yield "".join((*held, text)).strip("\r\n")
            held, many = [], True
        cut = max(0, len(last) - len(separator) + 1)  # a separator may lie across two chunks
        held.append(last[:cut])
        rest = last[cut:]
    text = "".join((*held, rest))
    yield text.strip("\r\n") if many else text


def _json(file: _Reader, path: Path, *, array: bool) -> Iterator[tuple[str, Any]]:
    """Records with their places: one a line or, where `array` allows it, entries of one array."""
    first = file.readline()
    if array and first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        entries = _parsed(first + file.read(), str(path))
        yield from ((f"entry {number} of {path}", entry) for number, entry in enumerate(entries, 1))
        return
    for number, line in enumerate(chain([first], file), 1):
        if line.strip():
            place = f"line {number} of {path}"
            yield place, _parsed(line, place)


def _parsed(data: bytes, place: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        start = len(data) - len(problem.object) + problem.start  # a byte order mark is left out of the object
        raise DataError(_not_utf8(place, data[start], start)) from None
    except (ValueError, RecursionError) as problem:  # a number of very many digits is a ValueError
        raise DataError(f"{place} is not JSON: {problem}; a line holds one whole object") from None


def _not_utf8(place: str, byte: int, offset: int) -> str:
    return f"{place} is not UTF-8: byte {byte:#04x} at offset {offset}; convert it, for example with iconv -t UTF-8"


def _parquet(file: _Reader, path: Path, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow: pip install 'esolm[data]'") from None
    table = parquet.ParquetFile(path if path.suffix.lower() == ".parquet" else io.BytesIO(file.read()))
    _fields(dict.fromkeys(table.schema_arrow.names, ""), names, str(path))
    rows = chain.from_iterable(batch.to_pylist() for batch in table.iter_batches(1024, columns=list(names)))
    for number, row in enumerate(rows, 1):
        yield _fields(row, names, f"row {number} of {path}")


def _data_set(name: str, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """`NAME`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT` of the `datasets` library, streamed. A name may be a folder."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{_HUB}{name} needs the datasets library: pip install 'esolm[data]'") from None
    if not name:
        raise DataError(f"{_HUB} names no data set: give {_HUB}NAME, as in {_HUB}roneneldan/TinyStories")
    title, config, split = (name, "", "") if Path(name).exists() else [*name.split(":", 2), "", ""][:3]
    try:
        stream = datasets.load_dataset(title, config or None, split=split or "train", streaming=True)
        for number, record in enumerate(stream, 1):
            yield _fields(record, names, f"record {number} of {name}")
    except DataError:
        raise
    except (OSError, ValueError, LookupError, RuntimeError) as problem:
        raise DataError(f"cannot load the data set {name}: {problem}") from None


def _fields(record: Any, names: tuple[str, ...], place: str) -> tuple[str, ...]:
    """The texts of the fields `names`; null counts as empty."""
    if not isinstance(record, dict):
        raise DataError(f"{place} is no object with fields, but {type(record).__name__}")
    values = []
    for name in names:
        if name not in record:
            known = [str(key) for key in record]
            raise DataError(
                f"{place} has no field {name!r}{nearest(name, known)}; it has {', '.join(known)}: name the right one"
            )
        value = "" if record[name] is None else record[name]
        if not isinstance(value, str):
            raise DataError(f"field {name!r} of {place} is {type(value).__name__}, not text")
        try:
            value.encode()
        except UnicodeEncodeError as problem:
            half = f"U+{ord(value[problem.start]):04X}"
            raise DataError(f"field {name!r} of {place} has half a surrogate pair, {half}: remove it") from None
        values.append(value)
    return tuple(values)
