"""Measures as pictures: every row is in them, at its values, and no word lies on another."""

import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from esolm import charts
from esolm.evaluate import Row
from esolm.judge import REAL_TEXT, Quality
from esolm.likelihood import Estimate
from pictures import drawn, words_on_words


def row(name: str, nats: float, kind="NELBO", variant=None, alpha_0=None, error=0.05) -> Row:
    estimate = Estimate(
        kind=kind, nats_per_token=nats, standard_error=error, num_tokens=900, num_texts=9, samples=1 + (kind == "NELBO")
    )
    return Row(
        name=name, method="", estimate=estimate, num_bytes=2000, conditional="", variant=variant, alpha_0=alpha_0
    )


def quality(name: str, perplexity: float, entropy: float, seed: object = 0) -> Quality:
    facts = {"judge": "ar", "tokenizer": "bytes", "dtype": "float32", "top_p": 0.9, "seed": seed}
    rest = {"bits_per_byte": 1.0, "distinct_1": 0.1, "distinct_2": 0.4, "repetition_4": 0.1}
    interval = (0.9 * perplexity, 1.2 * perplexity)
    sizes = {"num_texts": 64, "num_tokens": 900}
    return Quality(name=name, facts=facts, perplexity=perplexity, interval=interval, entropy=entropy, **sizes, **rest)


FAMILY = [
    row("runs/ar", 3.4, "exact", error=math.nan),
    row("runs/mdlm", 5.7),
    *(row(f"runs/a-{alpha:g}", 4 + alpha, variant="A", alpha_0=alpha) for alpha in (1.0, 0.25, 0.0625)),
    *(row(f"runs/b-{alpha:g}", 4 + 2 * alpha, variant="B", alpha_0=alpha) for alpha in (1.0, 0.5, 0.3, 0.0)),
    row("runs/b-1", 5.9, "importance-weighted bound", "B", 1.0),
]


def bars(axes) -> list[tuple[float, float, float]]:
    """Where each point with a bar stands, and the bar's end."""
    found = []
    for points, _, (lines,) in axes.containers:
        for x, y, ends in zip(*points.get_data(), lines.get_segments(), strict=True):
            found.append((x, y, ends.max(0)[np.ptp(ends, 0).argmax()]))
    return found


def test_each_row_is_drawn_with_its_error_and_eso_lms_against_alpha_0(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    charts.likelihoods(FAMILY, tmp_path / "rows.png")
    (figure,) = figures
    left, right, published = figure.axes
    for place, (x, y, end) in enumerate(bars(left)):
        error = FAMILY[place].estimate.standard_error
        assert (x, y) == (FAMILY[place].estimate.nats_per_token, place)
        assert end == pytest.approx(x + (0 if math.isnan(error) else error))
    assert [label.get_text() for label in left.get_yticklabels()][:2] == ["ar, exact", "mdlm, NELBO of 2"]
    places = {label.get_text(): at for at, label in zip(right.get_xticks(), right.get_xticklabels(), strict=True)}
    assert [places[text] for text in ("1", "0.5", "0.25", "0")] == [0, -1, -2, -5]
    assert "0.3" not in places  # there is no room beside 0.25
    for (x, y, end), alpha in zip(bars(right)[:3], (0.0625, 0.25, 1.0), strict=True):
        assert x == places[f"{alpha:g}"]
        assert (y, end) == (pytest.approx(math.exp(4 + alpha)), pytest.approx(math.exp(4 + alpha + 0.05)))
    assert len(bars(right)) == 7  # three of (A), four of (B): the weighted bound is another measure
    ours, theirs = (np.log(axes.get_ylim()) for axes in (right, published))
    assert ours[1] - ours[0] == pytest.approx(theirs[1] - theirs[0])  # the same distance is the same ratio
    assert [line.get_ydata()[0] for line in published.lines] == [30.96, 36.12]
    assert not words_on_words(figure)


@pytest.mark.parametrize("rows", [FAMILY[:2], FAMILY[:1], FAMILY[4:6]])
def test_few_rows_and_one_alpha_0_are_a_picture_too(tmp_path, monkeypatch, rows):
    figures = drawn(monkeypatch)
    charts.likelihoods(rows, tmp_path / "rows.svg")
    assert len(figures[0].axes) == 1 and len(bars(figures[0].axes[0])) == len(rows)
    assert not words_on_words(figures[0])


def test_each_file_is_a_point_with_its_interval_and_real_text_is_a_star(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    rows = [quality(f"out/{n}.jsonl", 10.0 * 2**n, 2 + n / 9) for n in range(8)] + [
        quality("kjv", 60.0, 4.0, REAL_TEXT)
    ]
    charts.qualities(rows, tmp_path / "texts.png")
    (axes,) = figures[0].axes
    assert [(x, y, end) for x, y, end in bars(axes)] == [
        (each.entropy, each.perplexity, pytest.approx(each.interval[1])) for each in rows
    ]
    looks = {(line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line, _, _ in axes.containers}
    assert len(looks) == 9 and sum(mark == "*" for _, mark, _ in looks) == 1
    assert "top-p 0.9, seed 0" in figures[0].get_suptitle()
    charts.qualities(rows[:1], tmp_path / "one.png")
    assert not any(words_on_words(figure) for figure in figures)


@pytest.mark.parametrize("command", ["evaluate", "judge"])
def test_a_picture_that_cannot_be_drawn_is_told_before_anything_is_read(tmp_path, capsys, command):
    from esolm.cli import main

    for plot, told in ((tmp_path / "a.doc", "must end in .png"), (tmp_path / "no/a.png", "there is no folder")):
        with pytest.raises(SystemExit) as end:
            main([command, str(Path("nowhere")), "--plot", str(plot)])
        assert end.value.code == 2 and told in capsys.readouterr().err
