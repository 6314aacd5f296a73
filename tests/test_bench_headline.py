"""Long texts beside the published ratios: what is timed at a place is what the run does there, and sums are sums."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from esolm import sample
from esolm.algorithms import Request
from esolm.bench import estimate, headline
from esolm.bench.estimate import Phase, Point, Standing
from esolm.bench.headline import Headline, Row, Settings
from esolm.cli import main
from esolm.denoiser import Config, Denoiser

SMALL = Settings(lengths=(32, 64), check_length=32, vocab_size=20, width=16, layers=1, heads=2, dtype="float32")
METHODS = SMALL.methods
HALF = Settings(alpha_0=0.5).methods


class Watched(Denoiser):
    """A network that notes what it is asked: rows, and rows in the cache before and with them."""

    def __init__(self) -> None:
        super().__init__(
            Config(vocab_size=20, length=64, width=16, layers=1, heads=2), torch.Generator().manual_seed(0)
        )
        self.asked: list[tuple[int, ...]] = []

    def forward(self, tokens, positions, who, cache=None):
        masks = int((tokens == self.config.mask_id).sum())
        held = () if cache is None else (int(cache.lengths[0]), cache._used)
        self.asked.append((tokens.shape[1], masks, *held))
        return super().forward(tokens, positions, who, cache)


@pytest.fixture
def quick(monkeypatch):
    """Places are timed no longer than they must be, and texts twice."""
    monkeypatch.setattr(estimate, "_LEAST_SECONDS", 1e-4)
    monkeypatch.setattr(headline, "_REPEATS", 2)


@pytest.mark.parametrize("method", [*METHODS.values(), *HALF.values()], ids=repr)
def test_an_evaluation_at_a_place_is_asked_what_it_is_asked_in_the_run(method):
    request, network = Request(length=64, stop_at_end=False), Watched()
    sample.complete(network, method, [request])
    run, network.asked = network.asked, []
    writer = Standing(network, method, [request])
    for step in (63, 0, 17, 40, 41):
        writer.stand(step)
        writer.advance()
        assert network.asked.pop() == run[step]
    writer.stand(0)
    while writer.active:
        writer.advance()
    assert network.asked == run


def test_keys_and_values_are_no_zeros_that_were_never_written():
    writer = Standing(Watched(), METHODS["esolm-b"], [Request(length=64)])
    writer.fill()
    assert all(bool(layer.ne(0).all()) for layer in (*writer._cache.keys, *writer._cache.values))


def test_each_phase_has_twelve_places_spread_over_it():
    (diffusion, sequential) = Standing(Watched(), HALF["esolm-a"], [Request(length=64)]).phases
    assert (diffusion.first, diffusion.stop, sequential.stop) == (0, sequential.first, 64)
    assert 0 < diffusion.stop < 64
    parts = Phase(first=100, stop=2148).places()
    assert len(parts) == 12 and (parts[0][0], parts[-1][1]) == (100, 2148)
    assert {stop - first for first, stop in parts} <= {170, 171}
    assert Phase(first=0, stop=3).places() == [(0, 1), (1, 2), (2, 3)]


def test_the_sum_of_a_curve_that_is_a_polynomial_is_exact():
    def cost(phase, step):
        return 1e-3 * (2 + phase.first + 3e-3 * step + 5e-6 * step**2)

    phases = [Phase(first=0, stop=700), Phase(first=700, stop=1000)]
    found = [
        Point(phase=phase, place=first + 7.5, seconds=cost(phase, first + 7.5))
        for phase in phases
        for first, _ in phase.places()
    ]
    truth = sum(cost(phase, np.arange(phase.first, phase.stop)).sum() for phase in phases)
    assert estimate.total(found) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_the_estimate_of_a_run_is_its_time(monkeypatch, name):
    """By a clock that moves as the sampler works: each step longer, a block's first one longer still, and what is found
    for many steps at once by their number."""
    clock = [0.0]
    advance, look_ahead = sample.Writer.advance, sample.Writer._look_ahead

    def worked(self):
        advance(self)
        clock[0] += 2e-3 + 2e-7 * self._step**2 + (0.02 if self._step % 16 == 1 and name == "bd3lm-16" else 0)

    def looked(self):
        known, found = self._feed, look_ahead(self)
        clock[0] += 0 if found is known else 1e-3 * (found.last - found.first)
        return found

    monkeypatch.setattr(sample.Writer, "advance", worked)
    monkeypatch.setattr(sample.Writer, "_look_ahead", looked)
    monkeypatch.setattr(estimate, "now", lambda device: clock[0])
    method, request = METHODS[name], Request(length=192, stop_at_end=False)
    network = Denoiser(Config(vocab_size=20, length=192, width=16, layers=1, heads=2))
    guess = estimate.total(list(estimate.points(network, method, request)))
    clock[0] = 0.0
    sample.complete(network, method, [request])
    assert guess == pytest.approx(clock[0], rel=0.02)


def test_short_texts_are_checked_and_long_ones_estimated(quick):
    *_, found = headline.measure(Settings(**{**vars(SMALL), "whole_seconds": 0.0}))
    assert [(row.method, row.length) for row in found.rows] == [(m, n) for n in (32, 64) for m in METHODS]
    for row in found.rows:
        assert row.evaluations == row.length
        assert row.kind == ("measured" if row.length == 32 else "estimated")
        assert (row.error is None) == (row.length == 64)
    assert found.checks == list(found.rows[:6])


def row(method: str, length: int, seconds: float, *, estimated: float | None = None) -> Row:
    guess = seconds if estimated is None else estimated
    sizes = {"dtype": "float32", "evaluations": length, "rows": 1.0}
    return Row(method=method, length=length, estimated=guess, measured=seconds, **sizes)


def test_ratios_stand_beside_the_published_ones_and_exponents_are_slopes():
    rows = [row("esolm-b", n, 1e-6 * n**1.5) for n in (2048, 8192)] + [row("mdlm", 8192, 1e-8 * 8192**3.0)]
    found = Headline(machine="test", settings=Settings(), rows=tuple(rows))
    ((of, length, ours, published),) = found.ratios()
    assert (of, length, published) == ("mdlm / esolm-b", 8192, 66.0)
    assert ours == pytest.approx(1e-2 * 8192**1.5)
    assert found.exponents() == {"esolm-b": pytest.approx(1.5)}


@pytest.mark.parametrize(("guess", "words"), [(1.04, "within 5 %"), (0.94, "NOT within 5 %")])
def test_an_estimate_that_is_off_is_said(guess, words):
    found = Headline(machine="test", settings=Settings(), rows=(row("ar", 256, 1.0, estimated=guess),))
    assert f"are {words} of the truth" in headline.markdown(found)


def test_an_interrupted_run_goes_on(tmp_path, quick):
    begun = headline.measure(SMALL, folder=tmp_path)
    first = [next(begun) for _ in range(4)][-1]
    begun.close()
    *_, found = headline.measure(SMALL, folder=tmp_path)
    assert found.rows[:3] == first.rows and len(found.rows) == 12
    ((again,), rows) = list(headline.measure(SMALL, folder=tmp_path)), found.rows
    assert again.rows == rows


def test_tables_and_a_picture(tmp_path, quick):
    pytest.importorskip("matplotlib")
    *_, found = headline.measure(SMALL)
    console = Console(width=120, record=True)
    console.print(headline.table(found))
    for word in (*METHODS, "estimate off by", "seconds of", "published (A6000)", "power of the length"):
        assert word in console.export_text(clear=False)
    headline.draw(found, tmp_path / "growth.svg")
    assert "<svg" in (tmp_path / "growth.svg").read_text()


def test_the_command_leaves_tables_and_tells_what_was_measured_before_ctrl_c(tmp_path, capsys, monkeypatch, quick):
    words = ["bench", "--headline", "--lengths", "32", "--check-length", "16", "--network", "1", "16", "2", "20"]
    advance, count = estimate.points, []

    def interrupted(*args):
        count.append(args)
        if len(count) == 4:
            raise KeyboardInterrupt
        return advance(*args)

    monkeypatch.setattr(estimate, "points", interrupted)
    with pytest.raises(SystemExit) as end:
        main([*words, "--json", "--out", str(tmp_path / "out")])
    assert end.value.code == 130
    assert [row["method"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["ar"]
    main([*words, "--out", str(tmp_path / "out")])
    assert "esolm-b" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "headline.json").read_text())["rows"]) == 12


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lengths", "32"], "--lengths is an option of --headline"),
        (["--headline", "--length", "64"], "--length has no place beside --headline"),
        (["--headline", "--lengths", "1"], "must be at least 2, got 1"),
        (["--headline", "--lengths", "64", "64"], "lengths must be different"),
    ],
)
def test_options_that_would_do_nothing_are_refused(capsys, words, told):
    with pytest.raises(SystemExit):
        main(["bench", *words])
    assert told in capsys.readouterr().err
