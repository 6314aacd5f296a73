"""The past of runs, read from their logs: curves, last figures, and whether a run is still going on.

    history = history.of(Path("runs/first"))    history.state    history.curves["loss"].steps, .values

A torn last line is left out; where steps were done again after a crash, the later ones count. It needs no checkpoint,
reads no tensors and imports no torch, so a hundred runs are listed at once.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from esolm import journal
from esolm.plain import FileError

State = Literal["finished", "interrupted", "running", "died"]


@dataclass(frozen=True)
class Curve:
    """One figure over the steps."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def last(self) -> float | None:
        return self.values[-1] if self.values else None


@dataclass(frozen=True, kw_only=True)
class History:
    """What the log of a run says. `why` is the reason of a run that died, where it could tell."""

    folder: Path
    state: State
    why: str
    step: int
    total: int | None
    facts: dict[str, Any]
    curves: dict[str, Curve]
    changed: float  # seconds since the epoch, of the last line

    def last(self, figure: str) -> float | None:
        """The last value of a figure; None if the run has none."""
        return self.curves[figure].last if figure in self.curves else None

    def values(self) -> dict[str, Any]:
        """The last figures, as plain data."""
        names = ("loss", "validation", "validation_error", "tokens_per_second", "seconds")
        found = {name: self.last(name) for name in names}
        head = {"run": str(self.folder), "state": self.state, "step": self.step, "total": self.total}
        return {**head, **found, "why": self.why, "changed": self.changed, "method": self.facts.get("method")}


def find(folders: Sequence[Path]) -> list[Path]:
    """Every run in these folders and below, in order. FileError for a folder that is not there."""
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise FileError(f"there is no folder {folder}: give one that holds runs")
        found += list(_below(folder))
    return list(dict.fromkeys(found))


def of(folder: Path) -> History:
    """The history of one run. FileError if the folder holds no log, or a damaged one."""
    path = folder / journal.FILE if folder.is_dir() else folder
    if not path.is_file():
        raise FileError(f"{folder} holds no run: there is no {journal.FILE} in it; `esolm runs` lists runs")
    entries = journal.read(path)
    began: dict[str, Any] = next((entry for entry in reversed(entries) if entry.get("event") == "began"), {})
    curves = _curves(entries)
    step = entries[-1]["step"] if entries else 0
    total = began.get("total")
    state, why = _state(entries, step, total, running=journal.is_written(path))
    return History(
        folder=path.parent,
        state=state,
        why=why,
        step=step,
        total=total,
        facts={name: value for name, value in began.items() if name not in ("step", "time", "event")},
        curves=curves,
        changed=float(entries[-1].get("time", 0.0)) if entries else path.stat().st_mtime,
    )


def ago(then: float, now: float | None = None) -> str:
    """How long ago a moment was: `12 s ago`, `3 h ago`."""
    seconds = max(0.0, (time.time() if now is None else now) - then)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _below(folder: Path) -> Iterator[Path]:
    for place, inside, files in os.walk(folder):
        inside[:] = sorted(name for name in inside if not name.startswith((".", "step-", "abandoned-")))
        if journal.FILE in files:
            yield Path(place)


def _curves(entries: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    """Every figure's curve; a step that comes again takes back what stood from there on."""
    curves: dict[str, Curve] = {}
    for entry in entries:
        if entry.get("event") == "began":
            _take_back(curves, int(entry["step"]))
        for name, value in entry.items():
            if name in ("step", "time") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            curve = curves.setdefault(name, Curve())
            while curve.steps and curve.steps[-1] >= entry["step"]:
                curve.steps.pop()
                curve.values.pop()
            curve.steps.append(int(entry["step"]))
            curve.values.append(float(value))
    return {name: curve for name, curve in curves.items() if name not in ("total", "tokens_per_step", *_NO_FIGURES)}


_NO_FIGURES = ("parameters", "seed")


def _take_back(curves: dict[str, Curve], step: int) -> None:
    """A run goes on from a step: what it had beyond is done again."""
    for curve in curves.values():
        while curve.steps and curve.steps[-1] > step:
            curve.steps.pop()
            curve.values.pop()


def _state(entries: Sequence[dict[str, Any]], step: int, total: int | None, *, running: bool) -> tuple[State, str]:
    if running:
        return "running", ""
    last = next((str(entry["event"]) for entry in reversed(entries) if "event" in entry), None)
    if last == "finished" or (last is None and total is not None and step >= total):
        return "finished", ""
    if last == "interrupted":
        return "interrupted", ""
    return "died", (last or "").removeprefix("began").removeprefix("died: ")
