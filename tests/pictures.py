"""Pictures as the tests look at them: what was drawn, and which words lie on others."""

import itertools
from typing import Any

import pytest


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved from now on; they are saved all the same."""
    from matplotlib.figure import Figure

    found: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (found.append(self), save(self, *a, **k))[1])
    return found


def words_on_words(figure: Any) -> list[tuple[str, str]]:
    """Pairs of visible tick labels of one axis that overlap."""
    figure.canvas.draw()
    found = []
    for axes in (*figure.axes, *(child for each in figure.axes for child in each.child_axes)):
        for axis in (axes.xaxis, axes.yaxis):
            labels = [*axis.get_ticklabels(minor=False), *axis.get_ticklabels(minor=True)]
            low, high = sorted(axis.get_view_interval())
            at = axis.get_ticklocs(), axis.get_ticklocs(minor=True)
            inside = [low <= value <= high for value in (*at[0], *at[1])]
            boxes = [
                (label.get_text(), label.get_window_extent())
                for label, shown in zip(labels, inside, strict=False)
                if shown and label.get_visible() and label.get_text()
            ]
            found += [(a, b) for (a, here), (b, there) in itertools.combinations(boxes, 2) if here.overlaps(there)]
    return found
