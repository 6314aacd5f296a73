"""The bench of learning: what it counts is what a step has to do, and its figures follow from one another."""

import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.algorithms.algorithm import Batch
from esolm.bench import learning
from esolm.bench.learning import measure, table, work_of
from esolm.denoiser import Config, Denoiser
from esolm.noise import Noise

LENGTH, TEXTS, WIDTH, LAYERS, VOCAB = 16, 4, 8, 3, 11
NETWORK = Denoiser(Config(vocab_size=VOCAB, length=LENGTH, width=WIDTH, layers=LAYERS, heads=2))
NOISE = Noise(seed=0, step=0, start=0, stop=TEXTS, total=TEXTS)
BLOCK = (3 + 1 + 4 + 4) * WIDTH**2  # qkv, out, up, down
KEY_VALUE = 2 * WIDTH**2


def views(algorithm, valid=None):
    batch = Batch.of(torch.randint(0, VOCAB - 1, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(0)))
    if valid is not None:
        batch = Batch(tokens=batch.tokens, given=batch.given, valid=valid)
    return algorithm.views(batch, NOISE, VOCAB - 1)


def test_the_work_of_autoregression_is_that_of_the_formula():
    (view,) = views(AR())
    rows, pairs = TEXTS * LENGTH, TEXTS * LENGTH * (LENGTH + 1) // 2
    work = work_of(view, NETWORK)
    assert (work.fed, work.rows, work.targets) == (rows, rows, rows)
    assert work.flops == 6 * rows * (LAYERS * BLOCK + WIDTH * VOCAB) + 12 * WIDTH * LAYERS * pairs


def test_rows_without_a_target_cost_keys_and_values_in_the_last_layer():
    (view,) = views(MDLM())
    rows, targets = TEXTS * LENGTH, int((view.weights > 0).sum())
    assert 0 < targets < rows
    products = (LAYERS - 1) * BLOCK * rows + BLOCK * targets + KEY_VALUE * (rows - targets) + WIDTH * VOCAB * targets
    pairs = LENGTH * ((LAYERS - 1) * rows + targets)
    assert work_of(view, NETWORK).flops == 6 * products + 12 * WIDTH * pairs


def test_rows_that_only_fill_up_a_batch_are_fed_and_not_counted():
    view = views(EsoLM(alpha_0=0.5))[1]
    masked = (view.weights > 0).sum(1)
    assert len(set(masked.tolist())) > 1  # texts of different numbers of masks
    work = work_of(view, NETWORK)
    assert work.fed == len(masked) * (int(masked.max()) + LENGTH - 1)
    # the last row of x is not fed, and one before the first mask is read by all
    assert work.rows == int(masked.sum()) + len(masked) * (LENGTH - 1)
    assert work.targets == int(masked.sum())


def test_padding_is_no_work():
    short = torch.zeros(TEXTS, LENGTH, dtype=torch.bool)
    short[:, : LENGTH // 2] = True
    (padded,) = views(AR(), short)
    (whole,) = views(AR())
    assert work_of(padded, NETWORK).rows == TEXTS * LENGTH // 2
    assert work_of(padded, NETWORK).flops < work_of(whole, NETWORK).flops / 2


def test_a_row_without_a_target_that_nobody_reads_is_no_work():
    given = torch.zeros(TEXTS, LENGTH, dtype=torch.bool)
    given[:, -1] = True
    tokens = torch.zeros(TEXTS, LENGTH, dtype=torch.int64)
    (view,) = AR().views(Batch(tokens=tokens, given=given, valid=~given | given), NOISE, VOCAB - 1)
    work = work_of(view, NETWORK)
    assert (work.fed, work.rows, work.targets) == (TEXTS * LENGTH, TEXTS * (LENGTH - 1), TEXTS * (LENGTH - 1))


def test_two_halves_cost_more_rows_and_no_more_targets():
    (blocks,) = views(BD3LM(block_size=4))
    assert work_of(blocks, NETWORK).rows == TEXTS * (2 * LENGTH - 4)


@pytest.fixture(scope="module")
def found():
    return measure(width=16, layers=2, heads=2, length=24, vocab_size=30, batch_size=4, repeats=2)


def test_every_method_is_measured_and_figures_follow_from_one_another(found):
    assert [row.method for row in found.rows[:4]] == ["mdlm", "ar", "bd3lm", "esolm-a"]
    assert [row.alpha_0 for row in found.rows[3:]] == [0.5, 0.125, 0.5, 1.0]
    for row in found.rows:
        values = row.values()
        assert 0 < row.fastest <= row.seconds <= row.slowest
        assert values["tokens_per_second"] == pytest.approx(4 * 24 / row.seconds)
        assert row.share == pytest.approx(values["flops_per_second"] / found.machine.gemm[row.dtype])
        assert values["rows"] <= values["fed"] and values["targets"] <= values["rows"]
    assert found.rows[0].times_mdlm == 1


def test_figures_are_of_the_steps_that_users_run_and_the_first_warms_up(monkeypatch, found):
    steps = []
    monkeypatch.setattr(learning, "machine", lambda: found.machine)

    def learn(run, network, batch, step):
        steps.append((type(run.algorithm).__name__, step, len(batch.tokens)))
        time.sleep(0 if step else 0.2)
        network.head.weight.grad = torch.ones_like(network.head.weight)
        return {}

    monkeypatch.setattr(learning, "learn", learn)
    taken = measure(width=8, layers=1, heads=1, length=8, vocab_size=5, batch_size=3, repeats=2)
    assert [step for name, step, _ in steps if name == "MDLM"] == [0, 1, 2]
    assert {texts for *_, texts in steps} == {3}
    assert len(steps) == 3 * len(taken.rows)
    assert min(row.slowest for row in taken.rows) < 0.2


def test_the_table_shows_every_row_whole_in_a_terminal_of_80_columns(found):
    """Its numbers were cut off there."""
    slow = replace(found.rows[0], seconds=12.345, fastest=12.3, slowest=13.4, tokens_per_second=123_456.0)
    console = Console(width=80, record=True)
    console.print(table(replace(found, rows=(slow, *found.rows[1:]))))
    text = console.export_text()
    for word in ("mdlm", "ar", "bd3lm", "esolm-a", "esolm-b", "0.125", "tokens/s", "/MDLM", "12,345", "123,456"):
        assert word in text
    assert "…" not in text


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure(repeats=0)
