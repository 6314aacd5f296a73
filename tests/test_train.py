"""Training: a resumed run is the same run, micro batches change nothing, Ctrl-C saves, and mistakes are named."""

import io
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from esolm import checkpoint, journal
from esolm import train as train_module
from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.algorithms.algorithm import Batch
from esolm.data import Loader
from esolm.denoiser import Block, Config, Denoiser, _Dropout
from esolm.optim import Config as Optim
from esolm.optim import Schedule
from esolm.state import portions
from esolm.tokenizer import Tokenizer
from esolm.tokenizing import tokenize, tokenize_pairs
from esolm.train import Run, learn, train

BYTES = Tokenizer.bytes()
TEXT = "the quick brown fox jumps over the lazy dog; " * 30
NETWORK = Config(vocab_size=258, length=16, width=32, layers=1, heads=2)
ALGORITHMS = [AR(), MDLM(), BD3LM(block_size=4), EsoLM(variant="A"), EsoLM(variant="B")]


def settings(**changes: object) -> Run:
    run = Run(
        algorithm=EsoLM(alpha_0=0.5),
        network=NETWORK,
        num_steps=8,
        batch_size=8,
        optim=Optim(schedule=Schedule(peak=3e-3, warmup=1)),
        dtype="float32",
        log_every=1,
        validate_every=4,
        validation_texts=8,
        save_every=4,
    )
    return replace(run, **changes)  # type: ignore[arg-type]


@pytest.fixture
def loader(tmp_path: Path) -> Loader:
    return Loader(tokenize([TEXT], BYTES, tmp_path / "tokens"), length=16)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


def run_of(folder: Path, loader: Loader, run: Run, **options: object) -> train_module.Outcome:
    return train(run, folder, tokenizer=BYTES, data=loader, validation=loader, console=quiet(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
def test_every_method_learns(tmp_path, loader, algorithm):
    run_of(tmp_path / "run", loader, settings(algorithm=algorithm, num_steps=60, validate_every=20))
    found = [entry["validation"] for entry in journal.read(tmp_path / "run") if "validation" in entry]
    assert found[-1] < found[0] < 6.0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_run_that_is_resumed_is_the_same_run_bit_for_bit(tmp_path, loader, dropout):
    network = replace(NETWORK, dropout=dropout)
    whole = run_of(tmp_path / "whole", loader, settings(network=network))
    run_of(tmp_path / "parts", loader, settings(network=network, num_steps=4))
    torch.rand(3)  # whatever else draws numbers in this process
    parts = run_of(tmp_path / "parts", loader, settings(network=network), resume=True)
    first, second = (checkpoint.load(outcome.path) for outcome in (whole, parts))
    for name in ("model", "ema", "optim"):
        ours, theirs = getattr(first, name), getattr(second, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    losses = [[e["loss"] for e in journal.read(tmp_path / f) if "loss" in e] for f in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert whole.validation == parts.validation


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
def test_the_size_of_a_micro_batch_changes_no_gradient(loader, algorithm):
    batch, gradients = loader.batch(0, 0, 8, 8), []
    for micro in (None, 3, 1):
        network = Denoiser(NETWORK, torch.Generator().manual_seed(0))
        terms = learn(settings(algorithm=algorithm, micro_batch=micro), network, batch, 0)
        gradients.append((terms, [p.grad.clone() for p in network.parameters() if p.grad is not None]))
    for terms, found in gradients[1:]:
        assert terms == pytest.approx(gradients[0][0], rel=1e-5)
        for ours, theirs in zip(gradients[0][1], found, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_changes_no_bit_of_any_gradient(loader, dropout):
    """The inside of a block drops the same numbers when it is computed again; two micro batches, two layers."""
    batch, gradients = loader.batch(0, 0, 8, 8), []
    for again in (False, True):
        network = Denoiser(replace(NETWORK, dropout=dropout, layers=2), torch.Generator().manual_seed(0))
        network.recompute = again
        learn(settings(network=network.config, micro_batch=4), network, batch, 0)
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(network.parameters()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_a_run_recomputes_and_compiles_where_it_is_told(monkeypatch):
    """Compiling itself takes minutes on a CPU."""
    compiled: list[dict[str, object]] = []
    monkeypatch.setattr(Block, "compile", lambda block, **options: compiled.append(options))
    for told in (False, True):
        state = train_module.State(settings(recompute=told, compile=told), BYTES, torch.device("cpu"), None)
        assert state.denoiser.recompute == told and compiled == ([{"dynamic": True}] if told else [])


def test_dropout_differs_from_step_to_step_and_seed_to_seed_and_touches_no_global_state(loader):
    batch, before = loader.batch(0, 0, 8, 8), torch.get_rng_state()
    network = Denoiser(replace(NETWORK, dropout=0.5), torch.Generator().manual_seed(0))
    run = settings(network=network.config, algorithm=AR())  # AR's own views draw nothing
    found = [learn(r, network, batch, step) for r, step in ((run, 0), (run, 0), (run, 1), (replace(run, seed=1), 0))]
    assert found[0] == found[1]
    assert len({term["sequential"] for term in found}) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_dropped_where_texts_are_scored(tmp_path, loader):
    plain, dropping = (
        run_of(tmp_path / str(rate), loader, settings(network=replace(NETWORK, dropout=rate), num_steps=1))
        for rate in (0.0, 0.5)
    )
    ours, theirs = plain.validation, dropping.validation
    assert ours is not None and theirs is not None
    assert ours.nats_per_token == pytest.approx(theirs.nats_per_token, abs=0.02)  # one update apart


def test_dropout_drops_its_share_and_keeps_the_mean():
    drop = _Dropout(0.1, torch.Generator().manual_seed(0))
    found = drop(torch.ones(100_000))
    assert float((found == 0).float().mean()) == pytest.approx(0.1, abs=0.005)
    assert float(found.mean()) == pytest.approx(1, abs=0.005)
    assert float(drop(torch.ones(10_000, dtype=torch.bfloat16)).max()) == pytest.approx(1 / 0.9, rel=2**-9)


def test_prompts_and_padding_carry_no_loss(loader):
    batch = loader.batch(0, 0, 8, 8)
    given, valid = torch.zeros_like(batch.given), torch.ones_like(batch.valid)
    given[:, :5], valid[:, 12:] = True, False
    other = batch.tokens.clone()
    other[:, 12:] = 7  # padding may hold anything
    network = Denoiser(NETWORK, torch.Generator().manual_seed(0))
    for algorithm in ALGORITHMS:
        run = settings(algorithm=algorithm)
        first, second = (
            learn(run, network, Batch(tokens=tokens, given=given, valid=valid), 0) for tokens in (batch.tokens, other)
        )
        assert first == pytest.approx(second, rel=1e-6)


def test_pairs_are_trained_on(tmp_path):
    data = tokenize_pairs([(f"{n}+1=", f"{n + 1}") for n in range(20)], BYTES, tmp_path / "pairs")
    outcome = run_of(tmp_path / "run", Loader(data, length=16), settings(num_steps=20))
    assert outcome.validation is not None and outcome.validation.nats_per_token < 5.5


def test_a_first_interrupt_saves_and_the_run_goes_on_from_there(tmp_path, loader, monkeypatch):
    steps = []

    def learn_and_interrupt(run, network, batch, step, *rest):
        steps.append(step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return learn(run, network, batch, step, *rest)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train_module, "learn", learn_and_interrupt)
    outcome = run_of(tmp_path / "run", loader, settings())
    assert outcome.interrupted and outcome.step == 3 and steps == [0, 1, 2]
    assert checkpoint.load(tmp_path / "run").step == 3
    assert signal.getsignal(signal.SIGINT) == before
    monkeypatch.undo()
    assert run_of(tmp_path / "run", loader, settings(), resume=True).step == 8


def test_bits_a_byte_are_of_the_text_that_was_validated(tmp_path):
    """End-of-text costs nats and has no byte; letters of two bytes are cut by windows."""
    data = Loader(tokenize(["né é" * 3] * 40, BYTES, tmp_path / "short"), length=16)
    run_of(tmp_path / "run", data, settings(num_steps=2))
    found = checkpoint.load(tmp_path / "run").for_readers().state
    tokens = next(data.windows(8)).tokens
    num_bytes = int((tokens < BYTES.end_id).sum())
    assert 0 < num_bytes < tokens.numel()
    assert found["bits_per_byte"] == pytest.approx(found["validation"] * tokens.numel() / num_bytes / math.log(2))


def test_the_best_checkpoint_by_validation_stays_and_a_resumed_run_knows_it(tmp_path, loader, monkeypatch):
    values = iter([5.0, 3.0, 4.0, 4.5, 4.25])
    scored = train_module.inspection.validation

    def validation(*arguments):
        return replace(scored(*arguments), nats_per_token=next(values))

    monkeypatch.setattr(train_module.inspection, "validation", validation)
    run = settings(num_steps=3, save_every=1, validate_every=1, keep=1)
    run_of(tmp_path / "run", loader, run)
    assert [path.name for path in (sorted((tmp_path / "run").glob("step-*")))] == ["step-000000002", "step-000000003"]
    run_of(tmp_path / "run", loader, replace(run, num_steps=5), resume=True)
    assert checkpoint.best(tmp_path / "run") == tmp_path / "run" / "step-000000002"
    assert checkpoint.load(tmp_path / "run").state["validation"] == 4.25
    assert len(list((tmp_path / "run").glob("step-*"))) == 2


def test_time_that_is_up_ends_a_run_and_saves(tmp_path, loader):
    outcome = run_of(tmp_path / "run", loader, settings(num_steps=10**6, minutes=0.02))
    assert 0 < outcome.step < 10**6
    assert checkpoint.load(tmp_path / "run").step == outcome.step


@pytest.mark.parametrize(
    ("noted", "asked", "passes"),
    [
        ({"micro_batch": 8, "portions": 1}, None, [8]),
        ({"micro_batch": 4, "portions": 2}, None, [4, 4]),
        ({"micro_batch": 3, "portions": 3}, None, [2, 3, 3]),
        ({"micro_batch": 1, "portions": 1}, None, [1] * 8),  # memory had run out
        ({"micro_batch": 4, "portions": 2}, 2, [2] * 4),  # wanted on purpose
        ({"micro_batch": 4, "began_on": 2}, None, [4, 4]),  # of versions that noted less
        ({"micro_batch": None}, None, [8]),
        ({"micro_batch": None, "ranks": 2}, None, [4, 4]),
    ],
)
def test_a_resumed_run_feeds_no_more_at_once_than_it_began_with(tmp_path, loader, monkeypatch, noted, asked, passes):
    saved = checkpoint.load(run_of(tmp_path / "run", loader, settings(num_steps=1)).path)
    rest = {key: saved.state[key] for key in ("seconds", "origin")}
    monkeypatch.setattr(checkpoint, "load", lambda _: replace(saved, state={**rest, **noted}))
    seen, views_of = [], train_module.views_of
    monkeypatch.setattr(train_module, "views_of", lambda *given: seen.extend(views_of(*given)) or views_of(*given))
    run_of(tmp_path / "run", loader, settings(num_steps=2, micro_batch=asked, algorithm=AR()), resume=True)
    assert [len(view.tokens) for view in seen] == passes


@pytest.mark.parametrize(
    ("texts", "length", "micro", "ranks", "found"),
    [
        (8, 16, None, 1, 1),
        (8, 16, 2, 1, 4),  # micro batches are that small anyway
        (8, 16, 4, 1, 2),
        (8, 16, 3, 1, 2),
        (8, 16, 1, 2, 4),
        (8, 16, 4, 2, 2),
        (8, 16, None, 2, 4),  # ranks may become more or fewer
        (3, 16, None, 2, 2),
        (3, 16, 1, 1, 2),
        (64, 128, None, 1, 2),  # 8,192 tokens
        (32, 128, None, 1, 1),
        (512, 128, None, 1, 4),
        (512, 128, None, 2, 4),
        (512, 128, None, 3, 6),
        (512, 128, 1, 8, 8),
        (2, 4096, None, 1, 2),  # no portion is without a text
    ],
)
def test_a_batch_has_four_portions_where_they_are_large_or_micro_batches_are_small(texts, length, micro, ranks, found):
    run = settings(batch_size=texts, micro_batch=micro, network=replace(NETWORK, length=length))
    assert portions(run, ranks, torch.device("cpu")) == found
    assert portions(run, ranks, torch.device("cuda")) == ranks


@pytest.mark.parametrize("noted", [{"portions": "two"}, {"portions": True}, {"micro_batch": 0}])
def test_what_is_no_count_in_a_checkpoint_is_told(tmp_path, loader, noted):
    saved = checkpoint.load(run_of(tmp_path / "run", loader, settings(num_steps=1)).path)
    checkpoint.save(tmp_path / "run", replace(saved, step=2, state={**saved.state, **noted}))
    with pytest.raises(checkpoint.CheckpointError, match=f"state.json of step 2 has {next(iter(noted))} = "):
        run_of(tmp_path / "run", loader, settings(num_steps=3), resume=True)


def test_another_run_continues_from_the_averaged_weights(tmp_path, loader):
    first = run_of(tmp_path / "first", loader, settings())
    state = train_module.State(settings(algorithm=AR()), BYTES, torch.device("cpu"), None)
    state.take_weights(first.path)
    ema = checkpoint.load(first.path).ema
    assert ema is not None
    assert all(torch.equal(parameter, ema[name]) for name, parameter in state.denoiser.named_parameters())


def test_a_run_that_goes_on_with_an_average_begins_it_at_its_weights(tmp_path, loader):
    """It began at the random weights that a run begins with, and held some of them for thousands of steps."""
    run_of(tmp_path / "run", loader, settings(optim=Optim(average=None)))
    state = train_module.State(settings(), BYTES, torch.device("cpu"), None)
    state.restore(tmp_path / "run")
    assert state.average is not None
    average = state.average.state()
    assert all(torch.equal(average[name], parameter) for name, parameter in state.denoiser.named_parameters())


@pytest.mark.parametrize("count", [8, 20, 33])
def test_as_many_texts_are_validated_as_asked_for(tmp_path, loader, count):
    """Of 20 there were 16: whole batches only."""
    outcome = run_of(tmp_path / "run", loader, settings(num_steps=1, validation_texts=count))
    assert outcome.validation is not None and outcome.validation.num_texts == count


def test_options_that_do_not_fit_are_named_all_at_once():
    with pytest.raises(ValueError, match=r"num_steps must be at least 1, got 0; .*micro_batch .*; minutes must be"):
        settings(num_steps=0, micro_batch=99, minutes=-1.0)
    with pytest.raises(ValueError, match="not divisible by block_size 5"):
        settings(algorithm=BD3LM(block_size=5))


def test_what_does_not_belong_together_is_refused(tmp_path, loader):
    wrong = settings(network=replace(NETWORK, vocab_size=300))
    with pytest.raises(ValueError, match="the tokenizer has 258 ids and the network 300"):
        run_of(tmp_path / "run", loader, wrong)
    run_of(tmp_path / "run", loader, settings(num_steps=1))
    with pytest.raises(ValueError, match="already holds a run: resume it"):
        run_of(tmp_path / "run", loader, settings())
    other = settings(network=replace(NETWORK, width=64))
    with pytest.raises(ValueError, match="another network"):
        run_of(tmp_path / "run", loader, other, resume=True)
    with pytest.raises(ValueError, match="has width = 32, this run 64"):
        run_of(tmp_path / "new", loader, other, start=tmp_path / "run")


def test_a_step_makes_its_views_once(tmp_path, loader, monkeypatch):
    """The search for what is not finite made them a second time, in every step."""
    made, real = [], train_module.views_of
    monkeypatch.setattr(train_module, "views_of", lambda *options: made.append(1) or real(*options))
    run_of(tmp_path / "run", loader, settings(num_steps=3))
    assert len(made) == 3
