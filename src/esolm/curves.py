"""Runs as a picture: loss and validation, by term and by noise level, rate, gradient norm, throughput, memory.

One colour a run, of a palette that colour-blind readers tell apart; one line style a term. matplotlib draws it (the
extra `plot`). It reads no logs (history.py) and measures nothing.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from esolm.history import Curve, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMATS = (".png", ".svg", ".pdf")
_BY_NOISE = "loss_by_noise/"
# Okabe and Ito's colours, which stay apart for all kinds of colour vision; yellow is too pale for lines on white
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")  # after the colours are used up
_MANY = 60  # points of a curve from which on it is drawn smoothed, over a faint one of all points
_MANY_TIMES = 8  # largest over smallest value from which on an axis is logarithmic


def check(path: Path) -> None:
    """ValueError before any work if the picture cannot be drawn: no matplotlib, an unknown format, no such folder."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("a picture needs matplotlib: pip install 'esolm[plot]'") from None
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"a picture must end in {', '.join(_FORMATS)}, got {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for the picture: make it first")


def draw(histories: Sequence[History], path: Path) -> None:
    """Draw the curves of runs into a file. ValueError if none of them has any yet."""
    if not any(history.curves for history in histories):
        raise ValueError("there is nothing to draw yet: the runs have no figures; wait for their first lines")
    from matplotlib.figure import Figure

    panels = [panel for panel in _PANELS if any(_has(history, panel) for history in histories)]
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(11, 3.1 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, (title, unit, _, drawn) in zip(grid, panels, strict=False):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        drawn(axes, histories)
        axes.grid(color="0.9", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    if len(histories) > 1:
        _legend_of_runs(figure, histories)
    else:
        figure.suptitle(str(histories[0].folder), fontsize=11)
    figure.savefig(path, dpi=150)


def plain_log(axes: "Axes", values: Sequence[float], which: Literal["x", "y"] = "y") -> None:
    """A logarithmic axis over values, with few ticks in plain numbers."""
    low, high = min(values), max(values)
    room = max(0.02, 0.06 * math.log(high / low))
    low, high = low * math.exp(-room), high * math.exp(room)
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high), f"{which}ticks": ticks(low, high)})
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")
    axes.tick_params(axis=which, which="minor", length=0)


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round values between two, evenly spread by ratio where they lie far apart."""
    for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        span = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [step * 10.0**power for power in span for step in steps]
        found = [value for value in found if low <= value <= high]
        if len(found) >= 4:
            return found[:: math.ceil(len(found) / 9)]
    size = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(size))
    step = unit * next(times for times in (1, 2, 5, 10) if times * unit >= size)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _losses(axes: "Axes", histories: Sequence[History]) -> None:
    for number, history in enumerate(histories):
        how = _look(number)
        _line(axes, history.curves.get("loss", Curve()), **how)
        found, errors = (history.curves.get(name, Curve()) for name in ("validation", "validation_error"))
        bars = errors.values if errors.steps == found.steps else None
        if found.steps:
            axes.errorbar(
                found.steps, found.values, yerr=bars, marker="o", markersize=4, capsize=3, linewidth=1, **_dark(how)
            )
    _legend(axes, ("training", {"linewidth": 1.6}), ("validation ± standard error", {"marker": "o", "linewidth": 1}))
    _log_if_wide(axes)


def _terms(axes: "Axes", histories: Sequence[History]) -> None:
    styles = {"loss_diffusion": "-", "loss_sequential": "--"}
    for number, history in enumerate(histories):
        for name, style in styles.items():
            _line(axes, history.curves.get(name, Curve()), **{**_look(number), "linestyle": style})
    _legend(axes, *((name.removeprefix("loss_"), {"linestyle": style}) for name, style in styles.items()))


def _by_noise(axes: "Axes", histories: Sequence[History]) -> None:
    """One run: each level over the steps, light to dark. Several: the last tenth of each over the time."""
    if len(histories) == 1:
        from matplotlib import colormaps

        levels = _levels(histories[0])
        for number, (middle, curve) in enumerate(levels):
            colour = colormaps["cividis"](0.92 * number / max(1, len(levels) - 1))
            label = f"t = {middle:.2f}" if number in (0, len(levels) // 2, len(levels) - 1) else None
            _line(axes, curve, color=colour, label=label, faint=False)
        axes.legend(fontsize=8, frameon=False, loc="upper right")
        return
    axes.set_xlabel("time t of the noise (0: clean, 1: all masked)")
    axes.set_title("Loss by noise level, last tenth of the run", loc="left", fontsize=11)
    for number, history in enumerate(histories):
        found = [(middle, _late(curve)) for middle, curve in _levels(history)]
        if found:
            axes.plot(*zip(*found, strict=True), marker="o", markersize=4, linewidth=1.6, **_look(number))
    axes.set_xlim(0, 1)


def _figure(name: str, scale: float = 1.0) -> Callable[["Axes", Sequence[History]], None]:
    """The panel of one figure."""

    def drawn(axes: "Axes", histories: Sequence[History]) -> None:
        for number, history in enumerate(histories):
            curve = history.curves.get(name, Curve())
            _line(axes, Curve(curve.steps, [value * scale for value in curve.values]), **_look(number))
        if name == "norm":
            _log_if_wide(axes)
        else:
            axes.set_ylim(bottom=0)
        if name == "rate":
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        if name == "tokens_per_second":
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")

    return drawn


_PANELS: tuple[tuple[str, str, str, Callable[["Axes", Sequence[History]], None]], ...] = (
    ("Loss", "nats a token", "loss", _losses),
    ("Loss by term", "nats a token", "loss_", _terms),
    ("Loss by noise level", "nats a masked token", _BY_NOISE, _by_noise),
    ("Gradient norm, before clipping", "norm", "norm", _figure("norm")),
    ("Learning rate", "rate", "rate", _figure("rate")),
    (
        "Throughput, validation and saving left out",
        "tokens a second",
        "tokens_per_second",
        _figure("tokens_per_second"),
    ),
    ("Peak memory", "GiB", "memory", _figure("memory", 2.0**-30)),
)


def _has(history: History, panel: tuple[str, str, str, Any]) -> bool:
    wanted = panel[2]
    if wanted == "loss":
        return bool(history.curves.keys() & {"loss", "validation"})
    if wanted == "loss_":
        return {"loss_diffusion", "loss_sequential"} <= history.curves.keys()
    return any(name.startswith(wanted) if wanted.endswith("/") else name == wanted for name in history.curves)


def _levels(history: History) -> list[tuple[float, Curve]]:
    """The middle of each part of [0, 1] with its curve, ascending."""
    found = []
    for name, curve in history.curves.items():
        if name.startswith(_BY_NOISE):
            low, high = (float(part) for part in name.removeprefix(_BY_NOISE).split("-"))
            found.append(((low + high) / 2, curve))
    return sorted(found, key=lambda level: level[0])


def _late(curve: Curve) -> float:
    """The mean over the last tenth of the steps."""
    late = [v for step, v in zip(curve.steps, curve.values, strict=True) if step >= 0.9 * curve.steps[-1]]
    return sum(late) / len(late)


def _look(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _STYLES[number // len(_COLOURS) % len(_STYLES)]}


def _dark(how: dict[str, Any]) -> dict[str, Any]:
    return {**how, "markerfacecolor": "white", "zorder": 3}


def _line(axes: "Axes", curve: Curve, *, faint: bool = True, **how: Any) -> None:
    """A curve; one of many points smoothed, over a faint one of all of them."""
    if not curve.steps:
        return
    if len(curve.steps) < _MANY:
        axes.plot(curve.steps, curve.values, linewidth=1.6, **how)
        return
    if faint:
        axes.plot(curve.steps, curve.values, linewidth=0.7, alpha=0.25, **{**how, "label": None})
    axes.plot(curve.steps, _smoothed(curve.values), linewidth=1.6, **how)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Means over a window of a fortieth of the curve, narrower towards both ends; what is not finite is left out."""
    half, found = max(1, len(values) // 80), []
    for place in range(len(values)):
        reach = min(half, place, len(values) - 1 - place)
        near = [value for value in values[place - reach : place + reach + 1] if math.isfinite(value)]
        found.append(sum(near) / len(near) if near else math.nan)
    return found


def _log_if_wide(axes: "Axes") -> None:
    lines: list[Any] = list(axes.lines)
    values = [float(v) for line in lines for v in line.get_ydata() if math.isfinite(v)]
    if values and min(values) > 0 and max(values) > _MANY_TIMES * min(values):
        plain_log(axes, values)


def _legend(axes: "Axes", *shown: tuple[str, dict[str, Any]]) -> None:
    """What the kinds of lines mean, in grey: colours are the runs'."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color="0.35", markersize=4, label=label, markerfacecolor="white", **how) for label, how in shown
    ]
    axes.legend(handles=lines, fontsize=8, frameon=False, loc="upper right")


def _legend_of_runs(figure: Any, histories: Sequence[History]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], linewidth=2, label=str(h.folder), **_look(number)) for number, h in enumerate(histories)]
    figure.legend(handles=lines, fontsize=9, frameon=False, loc="outside upper left", ncols=min(3, len(histories)))
