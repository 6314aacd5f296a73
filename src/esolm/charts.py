"""Measures of models and of texts as pictures: likelihoods with their errors, perplexity under a judge against entropy.

    likelihoods    a point for each row of `esolm evaluate`; of Eso-LM, also against alpha_0, beside the published curve
    qualities      a point for each row of `esolm judge`: texts that repeat themselves stand far to the left

matplotlib draws them (the extra `plot`). It measures nothing.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esolm import curves
from esolm.evaluate import Row
from esolm.judge import REAL_TEXT, Quality

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"exact": "#000000", "NELBO": "#0072B2", "importance-weighted bound": "#D55E00"}
_VARIANTS = {"A": ("#009E73", "s"), "B": ("#0072B2", "o")}
_APART = 0.7  # of a halving of alpha_0: labels that are nearer lie on each other
_MARKS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "D"), ("#CC79A7", "^"), ("#E69F00", "v"), ("#56B4E9", "P"))
# Perplexity of LM1B by alpha_0 (arXiv:2506.01928): the NELBO, exact at 0
_PUBLISHED = {
    "A": {1.0: 30.96, 0.5: 30.51, 0.25: 28.44, 0.125: 25.97, 0.0625: 24.51},
    "B": {1.0: 36.12, 0.5: 32.53, 0.25: 29.23, 0.125: 26.29, 0.0625: 24.53, 0.0: 21.86},
}


def likelihoods(rows: Sequence[Row], path: Path) -> None:
    """Nats a token and perplexity of each row with its standard error; where rows have at least two values of alpha_0,
    their NELBOs against it, with the published curve on an axis of its own and of the same ratios."""
    from matplotlib.figure import Figure

    variants = _by_alpha_0(rows)
    figure = Figure(figsize=(12.5 if variants else 7.5, max(3.2, 1.7 + 0.27 * len(rows))), layout="constrained")
    panels = figure.subplots(1, 2 if variants else 1, squeeze=False)[0]
    _each(panels[0], rows)
    if variants:
        _against_alpha_0(panels[1], variants)
    first = rows[0]
    alike = len({(row.estimate.num_tokens, row.num_bytes) for row in rows}) == 1
    told = f"{first.estimate.num_tokens:,} tokens, {first.num_bytes:,} bytes" if alike else "texts or tokens differ"
    figure.suptitle(f"{told}; bars: ± one standard error, over texts and draws", fontsize=9)
    figure.savefig(path, dpi=150)


def qualities(rows: Sequence[Quality], path: Path) -> None:
    """Generative perplexity with its interval against entropy, a point for each row; real text is a star."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, max(4.2, 1.6 + 0.22 * len(rows))), layout="constrained")
    axes, number = figure.subplots(), 0
    for row, name in zip(rows, _short([row.name for row in rows]), strict=True):
        colour, mark = _MARKS[number % len(_MARKS)]
        look: dict[str, Any] = {"color": colour, "marker": mark, "markersize": 7}
        if number >= len(_MARKS):
            look["markerfacecolor"] = "white"
        if row.facts["seed"] == REAL_TEXT:
            look = {"color": "black", "marker": "*", "markersize": 13}
        else:
            number += 1
        low, high = row.interval
        bars = [[max(0.0, row.perplexity - low)], [max(0.0, high - row.perplexity)]]
        label = f"{name} ({row.num_texts:,})"
        axes.errorbar([row.entropy], [row.perplexity], yerr=bars, label=label, linestyle="", capsize=3, **look)
    curves.plain_log(axes, [value for row in rows for value in row.interval])
    axes.margins(x=0.12)
    axes.set_xlabel("entropy, nats (low: the texts repeat themselves)")
    axes.set_ylabel("generative perplexity (lower is better)")
    _tidy(axes)
    facts = rows[0].facts
    written = [row.facts for row in rows if row.facts["seed"] != REAL_TEXT]
    found = ({str(each[name]) for each in written} for name in ("top_p", "seed"))
    top_p, seed = (each.pop() if len(each) == 1 and "[" not in str(each) else "several" for each in found)
    figure.suptitle(
        f"judge {facts['judge']}, tokenizer {facts['tokenizer']}, {facts['dtype']}; bars: 95 % of texts\n"
        f"top-p {top_p}, seed {seed}",
        fontsize=9,
    )
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, title="texts (number)", title_fontsize=8)
    figure.savefig(path, dpi=150)


def _each(axes: "Axes", rows: Sequence[Row]) -> None:
    """A line for each row: nats below, perplexity above."""
    import numpy as np

    names = _short([row.name for row in rows])
    several = len({row.estimate.kind for row in rows}) > 1
    for place, row in enumerate(rows):
        found = row.estimate
        error = 0.0 if math.isnan(found.standard_error) else found.standard_error
        colour, exact = _COLOURS[found.kind], found.kind == "exact"
        axes.errorbar(
            *([found.nats_per_token], [place]),
            xerr=[error],
            color=colour,
            marker="o",
            markersize=6,
            markerfacecolor=colour if exact else "white",
            capsize=3,
        )
    labels = [f"{name}, {_measure(row)}" if several else name for name, row in zip(names, rows, strict=True)]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.08)
    kinds = dict.fromkeys(_measure(row) for row in rows)
    axes.set_xlabel(f"nats a token ({'filled: exact; open: a bound' if several else ', '.join(kinds)})")
    above = axes.secondary_xaxis("top", functions=(np.exp, lambda x: np.log(np.maximum(x, 1e-9))))
    above.set_xlabel("perplexity")
    low, high = axes.get_xlim()
    above.set_xticks(curves.ticks(math.exp(low), math.exp(high)))
    above.xaxis.set_major_formatter("{x:g}")
    _tidy(axes)
    axes.grid(axis="y", visible=False)


def _against_alpha_0(axes: "Axes", variants: dict[str, list[Row]]) -> None:
    """Perplexity of each variant, falling from pure diffusion to autoregression, and the published one dashed."""
    alphas = sorted({alpha for v in variants for alpha in (*_PUBLISHED[v], *map(_alpha_0, variants[v]))})
    smallest = min(alpha for alpha in alphas if alpha > 0)
    theirs, ours, both = axes.twinx(), [], []
    for variant, rows in variants.items():
        colour, mark = _VARIANTS[variant]
        values = [row.estimate.perplexity for row in rows]
        errors = [0.0 if math.isnan(row.estimate.standard_error) else row.estimate.standard_error for row in rows]
        bars = [[v * (1 - math.exp(-e)) for v, e in zip(values, errors, strict=True)]]
        bars.append([v * (math.exp(e) - 1) for v, e in zip(values, errors, strict=True)])
        places = [_place(_alpha_0(row), smallest) for row in rows]
        axes.errorbar(places, values, yerr=bars, color=colour, marker=mark, capsize=3, label=f"Eso-LM ({variant})")
        known = _PUBLISHED[variant]
        at = [_place(alpha, smallest) for alpha in known]
        theirs.plot(at, list(known.values()), "--", color=colour, marker=mark, markersize=3, alpha=0.55, linewidth=1)
        axes.plot([], [], "--", color=colour, alpha=0.55, marker=mark, markersize=3, label=f"({variant}) published")
        ours += values
        both += [(row.estimate.perplexity, known[_alpha_0(row)]) for row in rows if _alpha_0(row) in known]
    shown = [value for variant in variants for value in _PUBLISHED[variant].values()]
    ratio = math.exp(sum(math.log(a / b) for a, b in both) / len(both)) if both else max(ours) / max(shown)
    ends = [*ours, *(value * ratio for value in shown)]
    curves.plain_log(axes, ends)
    curves.plain_log(theirs, [value / ratio for value in ends])
    ticks: list[float] = []
    for alpha in (*(_alpha_0(row) for rows in variants.values() for row in rows), *alphas):  # ours are told first
        if all(abs(_place(alpha, smallest) - _place(other, smallest)) >= _APART for other in ticks):
            ticks.append(alpha)
    axes.set_xticks([_place(alpha, smallest) for alpha in ticks], [f"{alpha:g}" for alpha in ticks])
    axes.set_xlabel("alpha_0 (0: autoregression, 1: diffusion)")
    axes.set_ylabel("perplexity here")
    theirs.set_ylabel("perplexity published, LM1B (dashed; same ratios)", color="0.4", fontsize=9)
    theirs.spines[["top", "left"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    told = sorted(zip(labels, handles, strict=True), key=lambda each: "published" in each[0])
    labels, handles = map(list, zip(*told, strict=True))
    axes.legend(handles, labels, fontsize=8, frameon=False, loc="upper left")
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _by_alpha_0(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """NELBOs and exact values of each variant of Eso-LM by alpha_0, where there are at least two."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.variant is not None and row.estimate.kind != "importance-weighted bound":
            found.setdefault(row.variant, []).append(row)
    return {
        variant: sorted(found[variant], key=_alpha_0)
        for variant in sorted(found)
        if len({row.alpha_0 for row in found[variant]}) > 1
    }


def _alpha_0(row: Row) -> float:
    assert row.alpha_0 is not None
    return row.alpha_0


def _place(alpha_0: float, smallest: float) -> float:
    """Where a value stands: halves are one apart, and 0 one before the smallest of the others."""
    return math.log2(alpha_0) if alpha_0 > 0 else math.log2(smallest) - 1


def _measure(row: Row) -> str:
    found = row.estimate
    return f"{found.kind} of {found.samples}" if found.samples > 1 else found.kind


def _short(names: Sequence[str]) -> list[str]:
    """Names without the folders that all share."""
    if len(set(names)) < 2:
        return [Path(name).name for name in names]
    shared = os.path.commonpath([os.path.abspath(Path(name).parent) for name in names])  # noqa: PTH100 - `..` stays
    return [os.path.relpath(name, shared) for name in names]


def _tidy(axes: "Axes") -> None:
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
