"""Timing of samplers: every method through the sampler that users run; as figures, a table and a picture."""

import json
import time

import pytest

from esolm import calibrate, recipes, sample
from esolm.bench import plot, writing
from esolm.bench.writing import Setting
from esolm.denoiser import Config, Denoiser

SMALL = Setting(length=32, vocab_size=300, width=32, layers=1, heads=2)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """The calibration with small arrays: its figures do not matter here."""
    figures = {"float32": 1e9, "bfloat16": 2e9}
    machine = calibrate.Machine(cpu="test", threads=1, bandwidth=1e9, gemm=figures, gemv=figures)
    monkeypatch.setattr(writing, "machine", lambda: machine)


def measured(*names: str, repeats: int = 2, **options) -> writing.Writing:
    settings = options.pop("settings", [SMALL])
    return writing.measure([(name, recipes.method(name)) for name in names], settings, repeats=repeats, **options)


def test_every_method_is_timed_in_every_setting():
    wide = Setting(length=32, vocab_size=300, width=64, layers=1, heads=2, batch=2, num_steps=4)
    found = measured(*recipes.METHODS, settings=[SMALL, wide])
    assert [(row.method, row.setting) for row in found.rows] == [(m, s) for s in (SMALL, wide) for m in recipes.METHODS]
    for row in found.rows:
        assert 0 < row.fastest <= row.seconds <= row.slowest
        assert row.kernels > 0
        assert row.setting.num_steps is not None or row.evaluations == 32
    few = {row.method: row.evaluations for row in found.rows if row.setting == wide}
    assert few["ar"] == 32 and few["mdlm"] <= 4 and few["bd3lm"] <= 8


def test_what_is_timed_is_the_samplers_own_step(monkeypatch):
    """A sampler that rests is slow by as much: no path of its own is timed."""
    advance = sample.Writer.advance

    def rested(self):
        time.sleep(0.03)
        advance(self)

    monkeypatch.setattr(sample.Writer, "advance", rested)
    assert measured("ar", repeats=1).rows[0].seconds > 32 * 0.03


def test_the_bound_is_the_weights_at_the_bandwidth_of_a_copy():
    (row,) = measured("ar", dtype="float32").rows
    weights = 32 * (3 * 32 + 32 + 2 * 4 * 32) + 300 * 32
    assert row.bound == pytest.approx(4 * weights / 1e9)


def test_rows_are_plain_figures():
    (row,) = measured("esolm-b").rows
    values = json.loads(json.dumps(row.values()))
    assert values["method"] == "esolm-b" and values["length"] == 32
    assert values["tokens_per_second"] == pytest.approx(32 / values["seconds"])
    assert values["step_over_kernels"] == pytest.approx(values["step"] / values["kernels"])


def test_the_table_tells_how_many_times_mdlm_a_method_is():
    found = measured("mdlm", "esolm-b")
    (table,) = writing.table(found).renderables
    slow, fast = found.rows
    assert list(table.columns[-1].cells) == ["1.0", f"{slow.seconds / fast.seconds:.1f}"]


def test_speeds_are_drawn(tmp_path):
    path = tmp_path / "speed.svg"
    plot.check(path)
    plot.draw(measured("ar", "esolm-b"), path)
    assert "<svg" in path.read_text() and path.stat().st_size > 5000


@pytest.mark.parametrize(("name", "words"), [("speed.bmp", "must end in"), ("nowhere/speed.png", "no folder")])
def test_a_picture_that_cannot_be_drawn_is_refused_before_any_work(tmp_path, name, words):
    with pytest.raises(ValueError, match=words):
        plot.check(tmp_path / name)


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        measured("ar", repeats=0)


def test_the_products_of_a_network_that_is_not_laid_out_for_a_cpu_are_counted_too():
    """What writes on other devices is the denoiser itself; its kernels could not be found once."""
    network = Denoiser(Config(vocab_size=300, length=32, width=32, layers=2, heads=2))
    kernels = writing._Kernels(network, batch=1, fed=2, drawn=1, read=16)
    products = 2 * 32 * (3 * 32 + 32 + 2 * 4 * 32) + 300 * 32
    assert kernels.nbytes == 4 * products
    assert kernels.seconds() > 0
