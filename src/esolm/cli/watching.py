"""`esolm runs` and `esolm plot`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from esolm.cli.parsing import Flag
from esolm.cli.terminal import console, print_json, say

if TYPE_CHECKING:
    from rich.table import Table

    from esolm.history import History

_COLOURS = {"finished": "green", "running": "cyan", "interrupted": "yellow", "died": "red"}


def runs(
    folders: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FOLDER ...", help_behavior_hint="")
    ] = (Path("runs"),),
    json: Flag = False,
) -> None:
    """List the runs in folders and below, with their last figures: how far, how good, how fast, and whether they live.

    Examples:

      esolm runs
      esolm runs runs/sweep out/demo
      esolm runs --json

    In Python:

      from esolm import history

      found = [history.of(folder) for folder in history.find([Path("runs")])]

    Args:
        folders: Where to look; left out, the folder runs.
        json: Print JSON lines instead of a table.
    """
    from esolm import history

    found = []
    for folder in history.find(folders):
        try:
            found.append(history.of(folder))
        except (ValueError, OSError) as problem:  # one damaged log must not hide the others
            say(f"esolm: warning: {problem}")
    found.sort(key=lambda run: run.changed)
    if json:
        for run in found:
            print_json(run.values())
    elif found:
        terminal = console(stderr=False)
        terminal.print(_table(found, terminal.width))
    else:
        say(f"no runs in {', '.join(map(str, folders))}: begin one with esolm train")


def plot(
    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...", help_behavior_hint="")],
    out: Path = Path("curves.png"),
) -> None:
    """Draw the curves of runs into one picture: loss, validation, noise levels, rate, gradient norm, speed, memory.

    Examples:

      esolm plot runs/first
      esolm plot runs/ar runs/mdlm runs/esolm --out compared.svg

    In Python:

      from esolm import curves, history

      curves.draw([history.of(Path("runs/first"))], Path("curves.png"))

    Args:
        runs: Folders of runs.
        out: The picture (.png, .svg, .pdf).
    """
    from esolm import curves, history

    if not runs:
        raise ValueError("give at least one run: esolm plot RUN --out FILE.png")
    curves.check(out)
    curves.draw([history.of(run) for run in runs], out)
    say(f"drawn into {out}")


_HEAD = ("run", "state", "step", "loss", "validation", "tokens/s", "time", "last line")
_GIVEN_UP = (
    "tokens/s",
    "last line",
    "time",
    "validation",
    "loss",
)  # in this order, where a terminal is too narrow
_NARROWEST = 24  # of the first column, which folds


def _table(found: "list[History]", width: int) -> "Table":
    from rich.cells import cell_len

    from esolm.tables import ruled

    rows = [dict(zip(_HEAD, _row(run), strict=True)) for run in found]
    widths = {name: max(cell_len(str(cell)) for cell in (name, *(row[name] for row in rows))) for name in _HEAD}
    widths["run"] = min(widths["run"], _NARROWEST)
    for name in _GIVEN_UP:
        if sum(widths.values()) + 2 * len(widths) > width:
            del widths[name]
    table = ruled()
    for name in widths:
        left = name in ("run", "state")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "run", overflow="fold")
    for row in rows:
        table.add_row(*(row[name] for name in widths))
    return table


def _row(run: "History") -> list[Any]:
    from rich.text import Text

    from esolm.history import ago
    from esolm.sinks import clock_time, plus_minus

    validation, error = run.last("validation"), run.last("validation_error")
    speed, seconds = run.last("tokens_per_second"), run.last("seconds")
    shown = "" if validation is None else plus_minus(validation, error)
    loss = run.last("loss")
    return [
        Text(str(run.folder)),
        Text(run.state, style=_COLOURS[run.state]),
        f"{run.step:,}" + ("" if run.total is None else f"/{run.total:,}"),
        "" if loss is None else f"{loss:.3f}",
        shown,
        "" if speed is None else f"{speed:,.0f}",
        "" if seconds is None else clock_time(seconds),
        ago(run.changed),
    ]
