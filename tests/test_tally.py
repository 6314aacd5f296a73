"""What the journal says of the steps: losses by term and noise level, speed, memory; samples disturb nothing."""

import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import esolm
from esolm import checkpoint, cli, journal, objective
from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.algorithms.algorithm import Request
from esolm.data import Loader
from esolm.denoiser import Denoiser
from esolm.noise import Noise
from esolm.tally import Levels, Tally
from esolm.tokenizing import tokenize
from test_train import BYTES, NETWORK, TEXT, run_of, settings


@pytest.fixture
def data(tmp_path: Path) -> Loader:
    return Loader(tokenize([TEXT], BYTES, tmp_path / "tokens"), length=16)


def figures(folder: Path) -> list[dict]:
    return [entry for entry in journal.read(folder) if "loss" in entry]


@pytest.mark.parametrize("algorithm", [MDLM(), BD3LM(block_size=4), EsoLM(alpha_0=0.5)], ids=repr)
def test_losses_by_noise_level_are_means_over_masked_rows_of_that_level(data, algorithm):
    batch, network = data.batch(0, 0, 64, 64), Denoiser(NETWORK, torch.Generator().manual_seed(0))
    views = algorithm.views(batch, Noise(seed=0, step=0, start=0, stop=64, total=64), NETWORK.mask_id)
    levels, expected = Levels(), {}
    for view in views:
        with torch.no_grad():
            weighted = objective.of_view(network, view)[1]
        levels.add(view, weighted)
        assert (view.times is None) == (view.term == "sequential")
        if view.times is not None:
            times = view.times.expand(weighted.shape)
            for place in range(10):
                there = (times >= place / 10) & (times < (place + 1) / 10) & (view.weights > 0)
                if bool(there.any()):
                    mean = float(weighted[there].double().sum() / view.weights[there].double().sum())
                    expected[f"loss_by_noise/{place / 10:.1f}-{(place + 1) / 10:.1f}"] = mean
    tally = Tally(tokens_per_step=100)
    tally.add({"diffusion": 1.0}, levels, 0.5)
    found = {name: value for name, value in tally.figures().items() if name.startswith("loss_by_noise/")}
    assert len(found) > 5 and found == pytest.approx(expected, rel=1e-6)
    assert tally.figures() == {}


def test_figures_are_means_over_the_steps_since_the_last_line():
    tally = Tally(tokens_per_step=100)
    for diffusion, sequential in ((1.0, 4.0), (3.0, 8.0)):
        tally.add({"diffusion": diffusion, "sequential": sequential}, Levels(), 0.25)
    assert tally.figures() == {"loss": 8, "loss_diffusion": 2, "loss_sequential": 6, "tokens_per_second": 400}


def test_micro_batches_change_no_figure(tmp_path, data):
    for micro in (None, 3):
        run_of(tmp_path / str(micro), data, settings(micro_batch=micro, log_every=4))
    ours, theirs = (figures(tmp_path / name) for name in ("None", "3"))
    for one, other in zip(ours, theirs, strict=True):
        for name in one.keys() - {"time", "seconds", "tokens_per_second", "memory"}:
            assert one[name] == pytest.approx(other[name], rel=1e-5)
    assert {"loss_diffusion", "loss_sequential", "rate", "norm", "memory", "tokens_per_second"} <= ours[0].keys()
    assert ours[0]["memory"] > 10**7 and ours[0]["tokens_per_second"] > 0


def test_samples_are_those_of_the_averaged_weights_and_disturb_nothing(tmp_path, data):
    for name, every in (("with", 4), ("without", None)):
        run_of(tmp_path / name, data, settings(sample_every=every, sample_texts=3))
    first, second = (checkpoint.load(tmp_path / name) for name in ("with", "without"))
    for part in ("model", "ema", "optim"):
        ours, theirs = getattr(first, part), getattr(second, part)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    entries = [e for e in journal.read(tmp_path / "with") if e.get("name") == "sample"]
    assert [entry["step"] for entry in entries] == [4] * 3 + [8] * 3
    model = esolm.load(tmp_path / "with", dtype="float32")
    written = model.complete([Request(length=16, seed=seed) for seed in range(3)])
    assert [entry["text"] for entry in entries[3:]] == [BYTES.decode(text.tokens.tolist()) for text in written]


def test_a_method_without_diffusion_has_no_losses_by_noise_level(tmp_path, data):
    run_of(tmp_path / "run", data, settings(algorithm=AR()))
    assert not [name for entry in figures(tmp_path / "run") for name in entry if name.startswith("loss_")]


@pytest.mark.parametrize(
    ("option", "module"), [("--tensorboard", "torch.utils.tensorboard"), ("--wandb=plays", "wandb")]
)
def test_a_missing_extra_is_told_before_the_text_is_read(tmp_path, monkeypatch, capsys, option, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--data", "nowhere.txt", "--out", str(tmp_path / "run"), option])
    assert end.value.code == 2 and "pip install 'esolm[" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_ended_before_its_first_checkpoint_may_begin_again(tmp_path, data):
    with journal.Journal(tmp_path / "run", console=Console(file=io.StringIO())) as log:
        log.write(1, loss=99.0)
    run_of(tmp_path / "run", data, settings())
    assert [entry["step"] for entry in figures(tmp_path / "run")] == list(range(1, 9))
    assert (tmp_path / "run" / "abandoned-journal.jsonl").exists()
