"""A page to open: a text replayed step by step, what was learned, who reads whom, how fast it writes.

One file with everything in it: the page of `assets/report.html` and the figures as JSON; nothing is fetched. `stills`
is the replay on paper: the text at a few of its steps, as an SVG picture; `drawn` is one picture of who reads whom. It
measures nothing.
"""

import html
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from itertools import groupby
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
    """Who reads whom, as `attention.picture` draws it: a line of `#` and `.` for each reading row. `labels` name the
    rows; `masks` says which of them hold a mask."""

    name: str
    caption: str
    rows: tuple[str, ...]
    labels: tuple[str, ...]
    masks: tuple[bool, ...]

    def __post_init__(self) -> None:
        sizes = {len(self.rows), len(self.labels), len(self.masks), *map(len, self.rows)}
        if len(sizes) != 1:
            raise ValueError(f"a picture is square, with a label and a flag for each row; got sizes {sorted(sizes)}")


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


def drawn(picture: Picture) -> str:
    """Who reads whom, as an SVG picture: a row reads the columns that are filled. What holds a token and what holds a
    mask differ in colour, which the page may set (classes `token`, `mask`, `blank`)."""
    side = _GAP + _CELL * len(picture.labels)
    marks = []
    for at, label in enumerate(picture.labels):
        kind, middle = "mask" if picture.masks[at] else "token", _GAP + (at + 0.5) * _CELL
        marks += [_letter(kind, _CELL / 2, middle + 4, label), _letter(kind, middle, _CELL - 3, label)]
        marks += [_cell(kind if mark == "#" else "blank", x, at) for x, mark in enumerate(picture.rows[at])]
    told = html.escape(f"{picture.name}. {picture.caption}")
    size = f'width="{side:g}" height="{side:g}" viewBox="0 0 {side:g} {side:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{told}">{"".join(marks)}</svg>'


_CELL, _GAP = 14.0, 18.0  # pixels: a cell, and the letters before the first
_FILLS = {"token": "#0a6883", "mask": "#99450a", "blank": "#e6e3db"}


def _letter(kind: str, x: float, y: float, letter: str) -> str:
    style = 'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12" text-anchor="middle"'
    return f'<text class="{kind}" fill="{_FILLS[kind]}" {style} x="{x:g}" y="{y:g}">{html.escape(letter)}</text>'


def _cell(kind: str, x: int, y: int) -> str:
    place = f'x="{_GAP + x * _CELL + 1:g}" y="{_GAP + y * _CELL + 1:g}"'
    return f'<rect class="{kind}" fill="{_FILLS[kind]}" {place} width="{_CELL - 2:g}" height="{_CELL - 2:g}" rx="2"/>'


def stills(replay: Replay, steps: Sequence[int], *, columns: int = 2, width: int = 52) -> str:
    """The text after each of `steps`, in panels of `width` characters beside and below each other: an SVG picture that
    is light or dark as its reader's screen is, and fetches no font."""
    lines = _wrapped(replay, width)
    across, down = width * _CHARACTER + 2 * _MARGIN, (len(lines) + 3) * _LINE
    panels = []
    for number, step in enumerate(steps):
        row, column = divmod(number, columns)
        marks = "".join(_still(replay, step, lines))
        panels.append(f'<g transform="translate({column * across + _MARGIN:g} {row * down + _LINE + 4:g})">{marks}</g>')
    size = f"{columns * across:g} {-(-len(steps) // columns) * down - _LINE // 2:g}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}">{_STILLS_STYLE}{"".join(panels)}</svg>\n'


_CHARACTER, _LINE, _MARGIN = 8.4, 21, 20  # pixels: a monospaced character of 14 pixels is 0.6 as wide
_STILLS_STYLE = """<style>
svg { --paper: #ffffff; --ink: #22252b; --blank: #e6e3db; --diffusion: #0a6883; --sequential: #99450a }
@media (prefers-color-scheme: dark) {
svg { --paper: #14161a; --ink: #e6e4df; --blank: #32373f; --diffusion: #6bcbe5; --sequential: #f3aa66 } }
text { font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre; fill: var(--ink) }
.given, .head { font-weight: bold } .diffusion { fill: var(--diffusion) } .sequential { fill: var(--sequential) }
.blank { fill: var(--blank) } .paper { fill: var(--paper) }
</style><rect class="paper" width="100%" height="100%" rx="12"/>"""
_PHASES = {"diffusion": "diffusion, in any order", "sequential": "left to right", "given": "given"}
_Line = list[tuple[str, int]]  # characters, each with the position of its token


def _still(replay: Replay, step: int, lines: Sequence[_Line]) -> Iterator[str]:
    """The marks of one panel: its heading, then what is written, and a box for what is not."""
    kinds = ["given"] * len(replay.pieces)
    for number, done in enumerate(replay.steps, 1):
        for position in done.positions:
            kinds[position] = done.phase if number <= step else f"blank {position}"  # a box for each token
    phase = replay.steps[step - 1].phase if step else "given"
    yield _words(f"step {step} of {len(replay.steps)}: {_PHASES[phase]}", 0, 0, f"{phase} head")
    for row, line in enumerate(lines, 2):
        for kind, run in groupby(enumerate(line), key=lambda at: kinds[at[1][1]]):
            places = list(run)
            text = "".join(character for _, (character, _) in places)
            column = places[0][0] + len(text) - len(text.lstrip())
            if not text.strip():
                continue
            if kind.startswith("blank"):
                x, y, wide = column * _CHARACTER, row * _LINE - 13, len(text.strip()) * _CHARACTER - 1
                yield f'<rect class="blank" x="{x:g}" y="{y:g}" width="{wide:g}" height="17" rx="3"/>'
            else:
                yield _words(text.strip(), column, row, kind)


def _words(text: str, column: int, row: int, kind: str) -> str:
    place = f'x="{column * _CHARACTER:g}" y="{row * _LINE:g}" textLength="{len(text) * _CHARACTER:g}"'
    return f'<text class="{kind}" {place}>{html.escape(text, quote=False)}</text>'


def _wrapped(replay: Replay, width: int) -> list[_Line]:
    """The finished text in lines of at most `width` characters, broken at spaces where there are any."""
    lines: list[_Line] = [[]]
    for position, piece in enumerate(replay.pieces[: replay.end]):
        for character in piece:
            if character == "\n":
                lines.append([])
                continue
            lines[-1].append((character, position))
            if len(lines[-1]) > width:
                spaces = [at for at, (other, _) in enumerate(lines[-1]) if other == " "]
                cut = spaces[-1] + 1 if spaces else width
                lines.append(lines[-1][cut:])
                del lines[-2][cut:]
    return lines
