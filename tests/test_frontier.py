"""Quality against time: what is kept is what was measured, on one machine, and the picture is of that."""

import json
from dataclasses import replace

import pytest
import torch

from esolm import frontier
from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.denoiser import Config, Denoiser
from esolm.frontier import Setting, best, measure, settings_of
from esolm.judge import Ours
from esolm.model import Model
from esolm.records import Records
from esolm.tokenizer import Tokenizer

LENGTH = 16


def model_of(algorithm) -> Model:
    network = Config(vocab_size=258, length=LENGTH, width=16, layers=1, heads=2)
    return Model(Denoiser(network, torch.Generator().manual_seed(0)), algorithm, Tokenizer.bytes(), dtype="float32")


JUDGE = Ours(model_of(AR()), "judge")


def point(tmp_path, algorithm=None, setting=None, **options):
    model = model_of(algorithm or EsoLM(alpha_0=0.5))
    how = {"name": "m", "folder": tmp_path, "num": 6, "batch": 2} | options
    return measure(model, setting or Setting(num_steps=4), JUDGE, **how)


def test_each_method_has_the_settings_that_it_takes():
    steps = [4, 8, None]
    assert settings_of(model_of(AR()), [0.5], steps) == [Setting()]
    assert settings_of(model_of(MDLM()), [0.5], steps) == [Setting(num_steps=t) for t in steps]
    assert settings_of(model_of(BD3LM(block_size=4)), [], steps) == [Setting(num_steps=t) for t in (1, 2, None)]
    found = settings_of(model_of(EsoLM()), [None, 1.0], [4, None], top_p=0.9)
    assert [(s.alpha_0, s.num_steps, s.top_p) for s in found] == [
        (None, 4, 0.9),
        (None, None, 0.9),
        (1.0, 4, 0.9),
        (1.0, None, 0.9),
    ]
    assert settings_of(model_of(EsoLM(alpha_0=0.0)), [None], steps) == [Setting()]
    assert settings_of(model_of(EsoLM()), [0.0], [4, 8]) == [Setting(alpha_0=0.0)]
    for algorithm in (AR(), MDLM(), BD3LM(block_size=4), EsoLM()):
        model = model_of(algorithm)
        for setting in settings_of(model, [None], steps):
            options = {"alpha_0": setting.alpha_0, "num_steps": setting.num_steps}
            assert model.algorithm.plan(model.request(**options), __import__("numpy").random.default_rng(0)).num_steps


def test_a_point_counts_evaluations_and_whole_texts(tmp_path):
    everything = point(tmp_path, MDLM(), Setting(num_steps=None))
    assert everything.nfe == LENGTH
    few = point(tmp_path, MDLM(), Setting(num_steps=2))
    assert 1 <= few.nfe <= 2
    assert few.seconds > 0
    assert few.quality.num_texts == few.num == 6


def test_an_interrupted_frontier_goes_on_with_the_same_texts_and_the_times_it_had(tmp_path, monkeypatch):
    whole = point(tmp_path / "whole")
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {name.partition("-")[0] for name in files} == {"written", "judged"}
    torn = tmp_path / "torn"
    torn.mkdir()
    (name,) = (name for name in files if name.startswith("written"))
    lines = files[name].splitlines(keepends=True)
    (torn / name).write_bytes(b"".join(lines[:2]) + lines[2][:10])
    asked = []
    real = Model.complete
    monkeypatch.setattr(Model, "complete", lambda self, part: asked.append(len(part)) or real(self, part))
    again = point(torn)
    assert asked == [2, 2, 2]  # a warm-up, and two batches of three
    assert (torn / name).read_bytes().splitlines()[:2] == files[name].splitlines()[:2]
    assert again.quality == whole.quality
    assert point(torn) == again  # nothing is written or timed again


def test_texts_that_hold_what_unicode_breaks_lines_at_are_gone_on_with(tmp_path):
    """A model of bytes writes them sooner or later, and what was kept was taken for damaged."""
    with Records(tmp_path, "written", {"seed": 0}) as records:
        records.add({"texts": ["a\u2028b\x85c"]})
    with Records(tmp_path, "written", {"seed": 0}) as records:
        assert records.entries == [{"texts": ["a\u2028b\x85c"]}]


def test_a_point_is_never_mixed_from_two_machines_or_settings(tmp_path, monkeypatch):
    point(tmp_path)
    monkeypatch.setattr(frontier, "describe", lambda network: "another CPU")
    assert point(tmp_path).machine.startswith("another CPU")
    point(tmp_path, seed=1)
    point(tmp_path, setting=Setting(num_steps=4, top_p=0.5))
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("written")]) == 4


def test_the_frontier_is_what_nothing_beats(tmp_path):
    one = point(tmp_path)
    made = [(1.0, 50.0), (2.0, 60.0), (3.0, 40.0), (4.0, 45.0), (0.5, 90.0)]
    points = [replace(one, seconds=s, quality=replace(one.quality, perplexity=p)) for s, p in made]
    assert [(p.seconds, p.quality.perplexity) for p in best(points)] == [(0.5, 90.0), (1.0, 50.0), (3.0, 40.0)]


def test_tables_and_the_picture_are_of_the_points(tmp_path):
    pytest.importorskip("matplotlib")
    points = [point(tmp_path, setting=Setting(num_steps=t)) for t in (2, 4)]
    frontier.keep(points, tmp_path)
    kept = json.loads((tmp_path / "frontier.json").read_text())
    assert [entry["setting"]["num_steps"] for entry in kept] == [2, 4]
    facts = kept[0]["quality"]["facts"]
    assert (facts["judge"], facts["top_p"], facts["seed"], facts["temperature"]) == ("judge", 1.0, 0, 1.0)
    assert len((tmp_path / "frontier.md").read_text().splitlines()) == 4
    frontier.draw(points, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


@pytest.mark.parametrize("options", [{"num": 0}, {"batch": 0}])
def test_nothing_is_no_number_of_texts(tmp_path, options):
    with pytest.raises(ValueError, match="num and batch must be at least 1"):
        point(tmp_path, **options)
