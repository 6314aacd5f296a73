"""Numbers that are not finite are found before the update, skipped, and end a run at the third in a row."""

import math
import random
from pathlib import Path

import pytest
import torch

from esolm import checkpoint, journal
from esolm import train as train_module
from esolm.data import Loader
from esolm.guard import Diverged
from esolm.tokenizing import tokenize
from esolm.train import learn, views_of
from test_train import BYTES, TEXT, run_of, settings

SPOILED = {  # what is spoiled, and how the message names it
    "loss": "the loss of the diffusion term is",
    "gradient": "the gradient of blocks.0.qkv.weight is",
    "weight": "the weight embed.weight is",
    "batch": "the weights of the batch (sequential view, text 1, row 2) is",
}
CASES = [(kind, value) for kind in SPOILED for value in (math.nan, math.inf)]
each = pytest.mark.parametrize(("kind", "value"), CASES, ids=lambda part: str(part))


@pytest.fixture
def data(tmp_path: Path) -> Loader:
    return Loader(tokenize([TEXT], BYTES, tmp_path / "tokens"), length=16)


def spoil(monkeypatch: pytest.MonkeyPatch, kind: str, value: float, steps: set[int]) -> dict[int, dict]:
    """Make one number `value` at some steps. Returns where the weights before each step will be noted."""
    noted: dict[int, dict] = {}
    own: list[float] = []  # the weight that was overwritten, to be put back before the next step

    def learn_spoiled(run, network, batch, step, levels, ranks):
        with torch.no_grad():
            if own:
                network.embed.weight[200, 3] = own.pop()
            noted[step] = {name: p.detach().clone() for name, p in network.named_parameters()}
            if kind == "weight" and step in steps:  # of an id that no text has: its gradient stays finite
                own.append(float(network.embed.weight[200, 3]))
                network.embed.weight[200, 3] = value
        terms = learn(run, network, batch, step, levels, ranks)
        if step in steps and kind == "weight":
            assert all(math.isfinite(term) for term in terms.values())
            assert all(bool(torch.isfinite(p.grad).all()) for p in network.parameters())
        if step in steps and kind == "gradient":
            network.blocks[0].qkv.weight.grad[1, 2] = value
        if step in steps and kind == "loss":
            terms["diffusion"] = value
        return terms

    def views_spoiled(run, batch, step, ranks):
        views = views_of(run, batch, step, ranks)
        if step in steps and kind == "batch":
            next(view for view in views if view.term == "sequential").weights[1, 2] = value
        return views

    monkeypatch.setattr(train_module, "learn", learn_spoiled)
    monkeypatch.setattr(train_module, "views_of", views_spoiled)
    return noted


def is_skipped(folder: Path, data: Loader, noted: dict[int, dict], kind: str, value: float, steps: set[int]) -> None:
    """Train, and look at what became of the spoiled steps: named, and not a bit of the weights changed by them."""
    total = max(steps) + 2
    run_of(folder, data, settings(num_steps=total, validate_every=1000, save_every=1000))
    told = [(e["step"], e["text"]) for e in journal.read(folder) if e.get("name") == "warning"]
    assert [step for step, _ in told] == [step + 1 for step in sorted(steps)]
    for _, text in told:
        assert text.startswith(
            f"update skipped: {SPOILED[kind]} {'NaN' if math.isnan(value) else 'infinite'}; no update"
        )
    for step in range(total - 1):
        same = all(torch.equal(before, noted[step + 1][name]) for name, before in noted[step].items())
        assert same == (step in steps)


@each
def test_a_number_that_is_not_finite_is_named_and_its_update_skipped(tmp_path, data, monkeypatch, kind, value):
    noted = spoil(monkeypatch, kind, value, {1, 4, 5})
    is_skipped(tmp_path / "run", data, noted, kind, value, {1, 4, 5})


@pytest.mark.slow
@each
def test_at_twenty_random_steps(tmp_path, data, monkeypatch, kind, value):
    chance = random.Random()
    steps = {3 * place + chance.randrange(2) for place in range(20)}  # never three in a row
    noted = spoil(monkeypatch, kind, value, steps)
    is_skipped(tmp_path / "run", data, noted, kind, value, steps)
    print(f"{kind} {value}: 20 of 20 found before the update, named and skipped")


@each
def test_the_third_in_a_row_ends_the_run_and_the_checkpoints_are_from_before(tmp_path, data, monkeypatch, kind, value):
    spoil(monkeypatch, kind, value, {2, 3, 5, 6, 7})  # two in a row are survived
    with pytest.raises(Diverged) as caught:
        run_of(tmp_path / "run", data, settings(num_steps=20, save_every=1))
    assert str(caught.value).startswith("stopped at step 8: 3 updates in a row were skipped, the last because the ")
    assert SPOILED[kind] in str(caught.value) and "--set optim.schedule.peak" in str(caught.value)
    saved = checkpoint.load(tmp_path / "run")
    assert saved.step == 5
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.model.values())
    assert journal.read(tmp_path / "run")[-1]["event"].startswith("died: stopped at step 8")


def test_weights_that_an_update_spoils_are_never_saved(tmp_path, data, monkeypatch):
    update = train_module.State.update

    def update_and_spoil(state, rate):
        norm = update(state, rate)
        if state.step == 4:
            with torch.no_grad():
                state.denoiser.head.weight[0, 0] = math.nan
        return norm

    monkeypatch.setattr(train_module.State, "update", update_and_spoil)
    with pytest.raises(Diverged, match=r"head\.weight is NaN"):
        run_of(tmp_path / "run", data, settings(num_steps=20, save_every=2, keep=9))
    assert checkpoint.load(tmp_path / "run").step == 2
