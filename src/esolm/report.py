"""A page to open: a text replayed step by step, what was learned, who reads whom, how fast it writes.

One file with everything in it: the page of `assets/report.html` and the figures as JSON; nothing is fetched. It draws
nothing itself and measures nothing.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path

from esolm.sample import Reveal

_SLOT = "/*DATA*/"


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step wrote: its phase and positions."""

    phase: str
    positions: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A text with the steps that wrote it. `pieces` are the strings of its tokens, in reading order; positions in no
    step were given; `end` is where the text stops."""

    title: str
    caption: str
    pieces: tuple[str, ...]
    steps: tuple[Step, ...]
    end: int


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points (step, value) or (step, value, standard error)."""

    name: str
    points: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Who reads whom, as `attention.picture` draws it: a line of `#` and `.` for each reading row."""

    name: str
    caption: str
    rows: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a method wrote texts."""

    model: str
    seconds: float  # of one text
    tokens_per_second: float
    nfe: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the page shows; parts left empty are left out."""

    title: str
    intro: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    replays: tuple[Replay, ...] = ()
    curves: tuple[Curve, ...] = ()
    speeds: tuple[Speed, ...] = ()
    speeds_note: str = ""
    pictures: tuple[Picture, ...] = ()
    samples: tuple[str, ...] = field(default=())


def replay_of(
    title: str, caption: str, pieces: Sequence[str], reveals: Sequence[Reveal], end: int | None = None
) -> Replay:
    """A replay from what the sampler revealed."""
    steps = tuple(Step(phase=reveal.phase, positions=reveal.positions) for reveal in reveals)
    return Replay(
        title=title, caption=caption, pieces=tuple(pieces), steps=steps, end=len(pieces) if end is None else end
    )


def write(report: Report, path: Path) -> None:
    """Write the page, whole or not at all. OSError if the place cannot be written."""
    page = (files("esolm") / "assets" / "report.html").read_text(encoding="utf-8")
    # "<" never appears in the data, so that no text can close the script it stands in
    data = json.dumps(asdict(report), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    before, after = page.split(_SLOT)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_text(before + data + after, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
