"""Results kept as they come: JSON lines under a key, so that a measurement that was interrupted goes on where it was.

    scores/nelbo-1f0c2d9e.jsonl     {"key": {"weights": "..", "seed": 0, ..}}      all that decides on the results
                                    {"nats": [41.5, 40.9], ..}                     the first result, and so on in order

Another key is another file, so that results of two settings never mix. Their table is replaced as a whole whenever
there is more to tell. It knows nothing of what it keeps.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esolm import plain

_FIGURES = "table.json"


def keep_table(folder: Path, markdown: str, rows: Sequence[Mapping[str, Any]], *, done: bool = True) -> None:
    """Write a table to `table.md` and all its figures to `table.json`, each whole or not at all. One that is not `done`
    takes the place of none that has more rows: of a measurement that is gone through again."""
    folder.mkdir(parents=True, exist_ok=True)
    if not done and len(_rows_there(folder)) > len(rows):
        return
    for name, text in (("table.md", markdown), (_FIGURES, plain.render(list(rows)))):
        part = folder / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)


def refuse_other_table(folder: Path, column: str) -> None:
    """ValueError, before any work, if a folder's table has rows without `column`: another command's, which ours would
    replace."""
    if any(not isinstance(row, dict) or column not in row for row in _rows_there(folder)):
        raise ValueError(f"{folder / _FIGURES} is the table of something else and would be lost: choose another --out")


def _rows_there(folder: Path) -> Sequence[Any]:
    """The rows of a folder's table; one that is no row if it cannot be read."""
    path = folder / _FIGURES
    try:
        rows = plain.parse(path.read_text(encoding="utf-8")) if path.is_file() else []
    except ValueError:
        rows = None
    return rows if isinstance(rows, list) else [None]


class Records:
    """The results of one key in a folder, in the order in which they came. A torn last line is dropped.

    ValueError if the file holds another key or a line that is none of ours; OSError where it cannot be written.
    """

    def __init__(self, folder: Path, name: str, key: Mapping[str, Any]) -> None:
        first = json.dumps({"key": key}, ensure_ascii=False, sort_keys=True, allow_nan=False)
        self.path = folder / f"{name}-{hashlib.sha256(first.encode()).hexdigest()[:16]}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.entries: list[dict[str, Any]] = []
        whole = self.path.read_bytes() if self.path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        lines = whole.decode(errors="replace").split("\n")[:-1]  # texts hold what else Unicode breaks lines at
        if lines and lines[0] != first:
            raise ValueError(f"{self.path} holds other results than its name says: remove it")
        for number, line in enumerate(lines[1:], start=2):
            self.entries.append(self._read(line, number))
        self._file = self.path.open("ab")
        self._file.truncate(len(whole))
        if not lines:
            self._append(first)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Keep a result; it is in the file when this returns."""
        self._append(json.dumps(entry, ensure_ascii=False, allow_nan=False))
        self.entries.append(dict(entry))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def _read(self, line: str, number: int) -> dict[str, Any]:
        try:
            entry = plain.parse(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise ValueError(f"{self.path} is damaged at line {number}: remove it, and its results are made again")
        return entry
