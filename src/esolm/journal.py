"""What a run tells while it runs: its own log, JSON lines, and whatever sinks it has (sinks.py).

    {"step": 0, "time": 1767225500.0, "event": "began", "total": 3000, "method": "EsoLM (B)"}
    {"step": 100, "time": 1767225600.0, "loss": 5.5, "rate": 0.0003}
    {"step": 100, "time": 1767225601.0, "name": "sample", "text": "ROMEO: ..."}
    {"step": 3000, "time": 1767229900.0, "event": "finished"}

The file is appended to line by line; a torn last line (a crash) is dropped on resuming, and so is what lies beyond the
resumed step. While a run goes on the file is locked, so a second run keeps out of the folder, and others can tell a
run that goes on from one that died (history.py). On a full disk lines wait in memory. It computes no figures.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from esolm.plain import FileError
from esolm.sinks import Sink, Terminal

FILE = "journal.jsonl"


class Journal:
    """The log of one run in a folder; a context manager.

    `total`: steps of the run, for the bar and the time left. `tokens_per_step`: shows tokens/s. `resume`: the
    step gone on from; entries beyond it are cut off. None begins a new log and refuses a folder that has one.
    `sinks`: where else it goes; one that fails is told of and left out, the run goes on. `facts`: what the run is.
    Raises ValueError for a log in the way, or one that another process writes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total: int | None = None,
        tokens_per_step: int | None = None,
        resume: int | None = None,
        sinks: Sequence[Sink] = (),
        facts: Mapping[str, Any] | None = None,
        console: Console | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lines = _Lines(folder, resume)
        self._terminal = Terminal(
            console or Console(stderr=True), total=total, tokens_per_step=tokens_per_step, every=every, clock=clock
        )
        self._facts = {"total": total, "tokens_per_step": tokens_per_step, **(facts or {})}
        self._sinks: list[Sink] = []
        self._ended = True  # until `begin`
        self._step = resume or 0
        for sink in (self._terminal, *sinks):
            try:
                sink.open(folder, resume=resume, facts=self._facts)
            except Exception:
                self.close()
                raise
            self._sinks.append(sink)

    def begin(self) -> None:
        """Note that the run begins here, or goes on; what follows without `end` is a run that died."""
        self._ended = False
        self._append({"step": self._step, "time": time.time(), "event": "began", **self._facts})

    def end(self, how: str) -> None:
        """Note how the run ended: finished, interrupted, or why it died."""
        if not self._ended:
            self._ended = True
            self._append({"step": self._step, "time": time.time(), "event": how})

    def write(self, step: int, **figures: int | float) -> None:
        """Note figures of a step (finite or not: NaN and infinities are kept as such)."""
        self._step = step
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in figures.items()}
        self._append({"step": step, "time": time.time(), **{n: _storable(v) for n, v in numbers.items()}})
        self._each(lambda sink: sink.write(step, numbers))

    def text(self, step: int, name: str, text: str) -> None:
        """Note a text of a step: a sample, a warning, a message."""
        self._step = step
        self._append({"step": step, "time": time.time(), "name": name, "text": text})
        self._each(lambda sink: sink.text(step, name, text))

    def close(self) -> None:
        """Let go of the file and the terminal; closing twice does no harm."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            self._safely(sink, lambda sink: sink.close())
        self._lines.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.end(f"died: {str(error) or type(error).__name__}")
        self.close()

    def _append(self, entry: dict[str, object]) -> None:
        problem = self._lines.append(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
        if problem is not None:
            words = f"the log cannot be written ({problem.strerror}); its lines wait in memory: free some space"
            self._terminal.text(self._step, "warning", words)

    def _each(self, do: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            if sink in self._sinks:  # else it has failed at what was to be said of another
                self._safely(sink, do)

    def _safely(self, sink: Sink, do: Callable[[Sink], None]) -> None:
        """Let a sink do something; what goes wrong in other people's programs must not end a run."""
        try:
            do(sink)
        except Exception as problem:
            if sink is self._terminal:
                raise
            self._sinks = [other for other in self._sinks if other is not sink]  # first: it is not told of its own end
            name = type(sink).__name__
            self.text(self._step, "warning", f"{name} failed ({problem}); nothing more is sent to it")


class Silent(Journal):
    """The log of a rank that keeps none: what it is told is told by rank 0."""

    def __init__(self, folder: Path, **unused: Any) -> None:
        del folder, unused

    def begin(self) -> None:
        pass

    def end(self, how: str) -> None:
        pass

    def write(self, step: int, **figures: int | float) -> None:
        pass

    def text(self, step: int, name: str, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a log (its file or its folder), oldest first; a torn last line is left out.

    Raises FileError naming the first line inside that is damaged.
    """
    path = path / FILE if path.is_dir() else path
    entries = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        entry = _entry(line)
        if entry is not None:
            entries.append({key: _number(value) for key, value in entry.items()})
        elif line:
            raise FileError(f"line {number} of {path} is damaged; remove it to read the rest")
    return entries


def is_written(path: Path) -> bool:
    """Whether a process is writing this log (its file or its folder) now, as far as locks tell."""
    path = path / FILE if path.is_dir() else path
    with path.open("rb") as file:
        return not _lock(file.fileno(), shared=True)


def set_aside(folder: Path) -> None:
    """Rename the log of a run that ended before its first checkpoint, so that another may begin in the folder."""
    path = folder / FILE
    if path.exists() and path.stat().st_size and not is_written(path):
        path.replace(folder / f"abandoned-{FILE}")


class _Lines:
    """A file that is appended to, locked while it is open; what a full disk refuses waits."""

    def __init__(self, folder: Path, resume: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        if resume is None and path.exists() and path.stat().st_size:
            raise ValueError(f"{folder} already holds the log of a run; resume it, or choose another folder")
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting, self._told = b"", False
        if not _lock(self._file):
            self.close()
            raise ValueError(f"another process is training in {folder}: wait for it, or choose another folder")
        if resume is not None:
            _cut(path, resume)

    def append(self, line: str) -> OSError | None:
        """Write a line; the problem, the first time that it cannot be written."""
        assert self._file is not None
        self._waiting += line.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as problem:
            told, self._told = self._told, True
            return None if told else problem
        self._told = False
        return None

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _lock(file: int, *, shared: bool = False) -> bool:
    """Lock a file until it is closed or its process ends; False if another process has it. Where there are no locks
    everybody has it."""
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def _cut(path: Path, step: int) -> None:
    """Shorten a log to its whole entries up to and including a step."""
    kept = 0
    with path.open("rb+") as file:
        for line in file:
            entry = _entry(line) if line.endswith(b"\n") else None
            if entry is None or entry["step"] > step:
                break
            kept += len(line)
        file.truncate(kept)


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _storable(value: int | float) -> int | float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _number(value: object) -> object:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
