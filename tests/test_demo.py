"""The demonstration with a very small network: it runs, it goes on, it is stopped without loss, it keeps its time."""

import io
import itertools
import os
import signal
from dataclasses import replace

import pytest
from rich.console import Console

from esolm import checkpoint, demo, journal, prepare, recipes, train
from esolm.denoiser import Config

PLAY = "KING RICHARD.\nNow is the winter of our discontent\nMade glorious summer by this sun of York;\n\n" * 12


def tiny(algorithm, vocab_size):
    network = Config(vocab_size=vocab_size, length=128, width=16, layers=1, heads=2)
    return replace(recipes.demo(algorithm, vocab_size), network=network, batch_size=4, validation_texts=2, num_steps=9)


@pytest.fixture
def perform(tmp_path, monkeypatch):
    """Run the demonstration as if a step took so long that there are ten; returns what it said."""
    (tmp_path / "plays.txt").write_text("\f".join([PLAY] * 8), encoding="utf-8")
    monkeypatch.setattr(demo, "_seconds_a_step", lambda *_: 6 / demo._OVERHEAD)
    monkeypatch.setattr(demo, "_TIMED_TEXTS", 1)

    def run(**options) -> str:
        console = Console(file=io.StringIO(), width=300)
        source = prepare.Source(data=str(tmp_path / "plays.txt"), validation=0.3)
        settings = {"minutes": 1.0, "recipe": tiny, "source": source, "vocab_size": 258, **options}
        try:
            demo.run(tmp_path / "out", console=console, **settings)
        except KeyboardInterrupt:
            console.print("KeyboardInterrupt")
        return console.file.getvalue()

    return run


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C in the third step of training."""
    learn, calls = train.learn, itertools.count(1)

    def stopped(*arguments):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return learn(*arguments)

    monkeypatch.setattr(train, "learn", stopped)


def test_it_trains_writes_and_leaves_a_page(perform, tmp_path):
    said = perform()
    assert checkpoint.load(tmp_path / "out" / "run").step == 10
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for words in ("Gaps, filled", '"training"', '"validation"', "Eso-LM (B), sequential", '"BD3-LM"'):
        assert words in page
    assert (tmp_path / "out" / "writing.svg").read_text(encoding="utf-8").startswith("<svg")
    assert f"Open the page: {tmp_path / 'out' / 'report.html'}" in said
    assert "KING RICHARD.\n" in said and "be, or" in said
    for part in ("Reading", "Training: 10 steps", "10/10", "two phases", "gaps filled", "Speed of the five", "Done in"):
        assert part in said


def test_validation_has_a_standard_error_at_several_steps(perform, tmp_path):
    perform()
    entries = [entry for entry in journal.read(tmp_path / "out" / "run") if "validation" in entry]
    assert len(entries) >= 5 and entries[-1]["step"] == 10
    assert all(entry["validation_error"] > 0 for entry in entries)


def test_run_again_it_uses_the_model_that_is_there(perform, tmp_path):
    perform()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "run").rglob("*.safetensors")}
    (tmp_path / "out" / "report.html").unlink()
    said = perform(seed=5, vocab_size=300)
    assert "is used again" in said and "Training" not in said and (tmp_path / "out" / "report.html").exists()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "run").rglob("*.safetensors")}


def test_stopped_half_way_it_saves_says_how_to_go_on_and_goes_on(perform, interrupted, tmp_path):
    said = perform()
    assert "Stopped at step 3 and saved. Go on with: esolm demo --out" in said and "KeyboardInterrupt" in said
    assert not (tmp_path / "out" / "report.html").exists()
    said = perform(seed=5)
    assert "at step 3 of 10" in said and (tmp_path / "out" / "report.html").exists()
    steps = [entry["step"] for entry in journal.read(tmp_path / "out" / "run") if "loss" in entry]
    assert steps == list(range(1, 11))


def test_stopped_while_it_shows_it_keeps_the_model(perform, monkeypatch, tmp_path):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_speeds", stopped)
        said = perform()
    assert "the trained model is in" in said and "Go on with: esolm demo" in said
    assert "is used again" in perform() and (tmp_path / "out" / "report.html").exists()


def test_a_run_that_was_killed_before_it_saved_begins_anew(perform, tmp_path):
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / journal.FILE).write_text('{"step": 1, "time": 0, "loss": 5.0}\n')
    perform()
    assert [entry["step"] for entry in journal.read(tmp_path / "out" / "run") if "loss" in entry] == list(range(1, 11))


@pytest.mark.parametrize("seconds", [0.1, 1.0, 5.0])
def test_the_steps_fit_into_the_time_and_the_rate_falls_to_its_end_with_them(seconds):
    run = demo._fitted(recipes.demo(recipes.method("esolm-b"), 4096), seconds, minutes=6.0)
    assert 0.85 * 360 < run.num_steps * seconds <= 360 < 60 * run.minutes <= 460
    rates = [run.optim.schedule.rate(step, run.num_steps) for step in range(run.num_steps)]
    assert max(rates) == pytest.approx(run.optim.schedule.peak, rel=0.05)
    assert rates[-1] < 0.05 * run.optim.schedule.peak
    assert run.num_steps / run.validate_every >= 8


def test_a_step_is_measured_on_a_network_that_is_thrown_away(tmp_path):
    (tmp_path / "plays.txt").write_text("\f".join([PLAY] * 8), encoding="utf-8")
    text = prepare.prepare(prepare.Source(data=str(tmp_path / "plays.txt"), validation=0.3), tmp_path, vocab_size=258)
    seconds = demo._seconds_a_step(tiny(recipes.method("esolm-b"), 258), text.training(128))
    assert 0 < seconds < 10


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan")])
def test_minutes_must_be_positive(tmp_path, minutes):
    with pytest.raises(ValueError, match="minutes must be positive"):
        demo.run(tmp_path, minutes=minutes)
    assert not list(tmp_path.iterdir())
