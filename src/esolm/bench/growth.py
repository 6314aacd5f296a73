"""How a step grows, shown: the table of all axes with their exponents, and a picture with a panel for each.

It measures nothing (scaling.py does). The picture needs matplotlib (the extra `plot`).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group

from esolm.bench.scaling import Axis, Fit, Scaling
from esolm.tables import ruled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BUSY = 0.5  # load from which a machine was not ours alone
_RANKS = "ranks"  # the panel that all axes of ranks share


def table(found: Scaling) -> Group:
    """The rows of each axis, its exponents below them."""
    shown = ruled(_title(found))
    shown.add_column("", no_wrap=True)
    for label in ("ms/step", "range", "tokens/s", "GFLOP", "share", "threads", "cores"):
        shown.add_column(label, justify="right", no_wrap=True)
    for axis in found.axes:
        shown.add_row(f"[bold]{axis.name}[/bold]")
        for value, row in zip(axis.values, axis.rows, strict=True):
            shown.add_row(
                f"  {value:,}",
                _short(1e3 * row.seconds),
                f"{_short(1e3 * row.fastest)}-{_short(1e3 * row.slowest)}",
                f"{row.tokens_per_second:,.0f}",
                _short(row.flops / 1e9),
                f"{row.share:.0%}",
                f"{row.ranks} x {row.threads}" if row.ranks > 1 else f"{row.threads}",
                f"{row.cores:.1f}",
            )
        seconds, flops = axis.seconds, axis.flops
        error = "" if seconds.error is None else f"± {seconds.error:.2f}"
        shown.add_row("  exponent", _signed(seconds.exponent), error, "", _signed(flops.exponent), style="green")
        if len(axis.rows) > 2:
            shown.add_row("  last two", _signed(seconds.last), "", "", _signed(flops.last), style="green")
        processor = axis.processor
        error = "" if processor.error is None else f"± {processor.error:.2f}"
        shown.add_row("  processor", _signed(processor.exponent), error, style="green")
        shown.add_section()
    return Group(shown, *notes(found))


def notes(found: Scaling) -> list[str]:
    """What the figures are, and what must be known to read them."""
    told = [
        f"Medians of {found.settings.repeats}, in turns, with the fastest and the slowest; {found.dtype} on "
        f"{found.machine}, {found.cores} cores. Share: of the rate of a large product, "
        f"{found.rate / 1e9:,.0f} GFLOP/s. Cores: at work, of all ranks. Last two: between the two largest values. "
        "Processor: the exponent of its seconds, which other programs change least."
    ]
    ranked = [row for axis in found.axes if axis.of == "ranks" for row in axis.rows]
    if shared := sorted({row.ranks for row in ranked if row.ranks * row.threads > found.cores}):
        told.append(f"{found.cores} cores are fewer than the threads of {_listed(shared)} ranks, which share them.")
    if len({row.ranks * row.threads for row in ranked}) == 1:
        told.append("All numbers of ranks have as many threads together: it shows what ranks cost, not what they gain.")
    if found.load is not None and found.load > _BUSY:
        told.append(f"Other programs ran: the load was {found.load:.1f} before. Measure again on a quiet machine.")
    return told


def draw(found: Scaling, path: Path) -> None:
    """A panel for each axis, both scales logarithmic: seconds with their range, the fit, and what the counted FLOPs
    take at the rate of a large product; of ranks tokens a second."""
    from matplotlib.figure import Figure

    sizes = [axis for axis in found.axes if axis.of != "ranks"]
    ranks = [axis for axis in found.axes if axis.of == "ranks"]
    panels = len(sizes) + bool(ranks)
    columns = min(panels, 2)
    figure = Figure(figsize=(4.5 * columns, 3.6 * -(-panels // columns) + 0.5), layout="constrained")
    places = figure.subplots(-(-panels // columns), columns, squeeze=False).flatten().tolist()
    for axis, place in zip(sizes, places, strict=False):
        _panel(place, axis, found.rate)
    if ranks:
        _panel_of_ranks(places[len(sizes)], ranks)
    for place in places[panels:]:
        place.set_visible(False)
    figure.suptitle(_title(found), fontsize=9)
    figure.savefig(path, dpi=150)


def _panel(place: "Axes", axis: Axis, rate: float) -> None:
    x, seconds = axis.values, [row.seconds for row in axis.rows]
    below = [row.seconds - row.fastest for row in axis.rows]
    above = [row.slowest - row.seconds for row in axis.rows]
    place.errorbar(x, seconds, yerr=[below, above], fmt="o", color="C0", label="measured")
    place.plot(x, _line(axis, axis.seconds), color="C0", label=f"fit: {axis.name}^{axis.seconds.exponent:.2f}")
    least = [row.flops / rate for row in axis.rows]
    label = f"FLOPs at the product's rate: ^{axis.flops.exponent:.2f}"
    place.plot(x, least, "--", color="C1", label=label)
    _dressed(place, axis, "seconds a step")


def _panel_of_ranks(place: "Axes", axes: list[Axis]) -> None:
    for number, axis in enumerate(axes):
        speeds = [row.tokens_per_second for row in axis.rows]
        label = f"{axis.name} (seconds ^{axis.seconds.exponent:.2f})"
        place.plot(axis.values, speeds, "os^v"[number % 4] + "-", color=f"C{number}", label=label)
    _dressed(place, axes[0], "tokens a second")


def _dressed(place: "Axes", axis: Axis, told: str) -> None:
    place.set_xscale("log", base=2)
    place.set_yscale("log")
    place.set_xticks(axis.values, [f"{value:,}" for value in axis.values], fontsize=8)
    place.minorticks_off()
    place.set_xlabel(_RANKS if axis.of == "ranks" else axis.name)
    place.set_ylabel(told)
    place.spines[["top", "right"]].set_visible(False)
    place.legend(frameon=False, fontsize=7)


def _line(axis: Axis, fit: Fit) -> list[float]:
    """The fitted power, through the middle of the points."""
    count = len(axis.rows)
    middle = 1.0
    for value, row in zip(axis.values, axis.rows, strict=True):
        middle *= (row.seconds / value**fit.exponent) ** (1 / count)
    return [middle * value**fit.exponent for value in axis.values]


def _title(found: Scaling) -> str:
    told = found.settings
    return (
        f"A step of {type(told.algorithm).__name__} as it grows: {told.batch_size} texts of {told.length:,}, "
        f"width {told.width}, {told.layers} layers, vocabulary {told.vocab_size:,}, unless the row says otherwise"
    )


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 1 else f"{number:.2f}"


def _signed(exponent: float) -> str:
    return f"{exponent:.2f}" if abs(exponent) >= 0.005 else "0.00"


def _listed(numbers: list[int]) -> str:
    return " and ".join(map(str, numbers))
