"""Documents and prompt/answer pairs from files, folders, JSON lines, Parquet, compressed or not, and named data sets.

    documents("books/")      every file below, sorted        documents("hf:roneneldan/TinyStories")     streamed
    documents("play.txt")    one document, or one between form feeds     pairs("qa.jsonl", prompt="question")

It yields text; tokens are another file's.
"""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from esolm.plain import nearest

PAGE = "\f"  # between documents of one file
_PACKED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_HUB = "hf:"


class DataError(ValueError):
    """A text is missing, empty, damaged or in another form. The message names the place and what to do."""


def documents(source: str | Path, *, field: str = "text", separator: str = PAGE) -> Iterator[str]:
    """Texts of a source, empty ones left out. `field`: the text's name in JSON lines, Parquet and data sets;
    `separator` stands between documents of a plain file. DataError if there is none, or for broken input."""
    found = False
    for record in _records(source, (field,), separator):
        if record[0].strip():
            found = True
            yield record[0]
    if not found:
        raise DataError(f"there is no text in {source}: every document is empty")


def pairs(source: str | Path, *, prompt: str = "prompt", answer: str = "answer") -> Iterator[tuple[str, str]]:
    """Prompts and answers of JSON lines, Parquet or a data set, pairs with an empty answer left out. DataError."""
    found = False
    for record in _records(source, (prompt, answer), None):
        if record[1].strip():
            found = True
            yield record[0], record[1]
    if not found:
        raise DataError(f"there is no answer in {source}: every one is empty")


def shipped(name: str = "shakespeare") -> Path:
    """The file of a corpus that comes with the package."""
    return Path(str(files("esolm") / "assets" / f"{name}.txt.xz"))


def _records(source: str | Path, names: tuple[str, ...], separator: str | None) -> Iterator[tuple[str, ...]]:
    """The named fields of every record; a plain text has one field, itself."""
    if str(source).startswith(_HUB):
        yield from _data_set(str(source)[len(_HUB) :], names)
        return
    for path in _paths(Path(source)):
        kind = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in (*_PACKED, ".zst")]
        if kind[-1:] == [".parquet"]:
            yield from _parquet(path, names)
        elif kind[-1:] in ([".jsonl"], [".json"], [".ndjson"]):
            yield from _json_lines(path, names)
        elif separator is None:
            raise DataError(f"{path} is plain text; prompts and answers come as JSON lines or Parquet")
        else:
            parts = _decoded(_read(path), path).split(separator)
            yield from ((part.strip("\n") if len(parts) > 1 else part,) for part in parts)


def _paths(path: Path) -> Iterator[Path]:
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        if not inside:
            raise DataError(f"there is no file in the folder {path}")
        yield from inside
    elif path.exists():
        yield path
    else:
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}{nearest(path.name, near)}")


def _opened(path: Path) -> Any:
    """A file of bytes, unpacked as it is read."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path} needs zstandard: pip install 'esolm[data]'") from None
        return io.BufferedReader(zstandard.open(path, "rb"))
    opener: Any = _PACKED.get(suffix, open)
    return opener(path, "rb")


def _read(path: Path) -> bytes:
    try:
        with _opened(path) as file:
            data: bytes = file.read()
            return data
    except (OSError, EOFError, lzma.LZMAError) as problem:
        raise DataError(f"cannot read {path}: {problem}") from None


def _decoded(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise DataError(
            f"{path} is not UTF-8: byte {data[problem.start]:#04x} at offset {problem.start}; "
            "convert it, for example with iconv -t UTF-8"
        ) from None


def _json_lines(path: Path, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(_decoded(line, path))
                except json.JSONDecodeError as problem:
                    raise DataError(f"line {number} of {path} is not JSON: {problem}") from None
                yield _fields(record, names, f"line {number} of {path}")
    except (OSError, EOFError, lzma.LZMAError) as problem:
        raise DataError(f"cannot read {path}: {problem}") from None


def _parquet(path: Path, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow: pip install 'esolm[data]'") from None
    try:
        table = parquet.ParquetFile(path)
    except (OSError, ValueError) as problem:
        raise DataError(f"cannot read {path}: {problem}") from None
    _fields(dict.fromkeys(table.schema_arrow.names, ""), names, str(path))
    for batch in table.iter_batches(columns=list(names)):
        for record in batch.to_pylist():
            yield _fields(record, names, str(path))


def _data_set(name: str, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """`NAME`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT` of the `datasets` library, streamed."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{_HUB}{name} needs the datasets library: pip install 'esolm[data]'") from None
    parts = [*name.split(":"), "", ""]
    try:
        stream = datasets.load_dataset(parts[0], parts[1] or None, split=parts[2] or "train", streaming=True)
        for number, record in enumerate(stream):
            yield _fields(record, names, f"record {number} of {name}")
    except (OSError, ValueError) as problem:
        if isinstance(problem, DataError):
            raise
        raise DataError(f"cannot load the data set {name}: {problem}") from None


def _fields(record: Any, names: tuple[str, ...], place: str) -> tuple[str, ...]:
    if not isinstance(record, dict):
        raise DataError(f"{place} is no object with fields, but {type(record).__name__}")
    values = []
    for name in names:
        if name not in record:
            known = ", ".join(map(str, record))
            raise DataError(f"{place} has no field {name!r}{nearest(name, list(map(str, record)))}; it has {known}")
        if not isinstance(record[name], str):
            raise DataError(f"field {name!r} of {place} is {type(record[name]).__name__}, not text")
        values.append(record[name])
    return tuple(values)
