"""What holds for all inputs: orders, schedules, counts, times, random numbers, and draws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esolm.draw import Draw, draw, draw_rows
from esolm.noise import Noise, generator, uniforms
from esolm.order import Interleaved, Uniform, apply, by_group, ramp, undo
from esolm.schedule import EPSILON, LogLinear, reveal_counts, spread_times, stratified_times

QUICK = settings(deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**63 - 1)
SHARES = st.floats(0, 1)
FREE = st.lists(st.integers(0, 40), unique=True, max_size=24).map(sorted)
STEPS = st.none() | st.integers(1, 30)


# --- orders


@QUICK
@given(SEEDS, st.integers(1, 12))
def test_an_order_is_a_permutation_that_undo_takes_back(seed, length):
    rng = generator(seed)
    group = torch.from_numpy(rng.integers(0, 3, (3, length)))
    key = torch.from_numpy(rng.random((3, length)))
    order = by_group(group, key)
    assert torch.equal(order.sort(1).values, torch.arange(length).expand(3, length))
    values = torch.from_numpy(rng.integers(0, 99, (3, length)))
    assert torch.equal(undo(apply(values, order), order), values)
    assert torch.equal(apply(undo(values, order), order), values)


@QUICK
@given(SEEDS, st.integers(1, 12))
def test_an_order_goes_group_by_group_and_by_key_inside_a_group(seed, length):
    rng = generator(seed)
    group = torch.from_numpy(rng.integers(0, 3, (2, length)))
    key = torch.from_numpy(rng.random((2, length)))
    order = by_group(group, key)
    for groups, keys in zip(apply(group, order).tolist(), apply(key, order).tolist(), strict=True):
        assert list(zip(groups, keys, strict=True)) == sorted(zip(groups, keys, strict=True))
    reading = by_group(group, ramp(length).expand(2, length))
    assert torch.equal(reading, group.argsort(dim=1, stable=True))


@QUICK
@given(FREE, SHARES, STEPS, SEEDS, st.sampled_from([Uniform(), Interleaved()]))
def test_chosen_positions_are_free_ones_each_once_in_as_many_steps_as_asked(free, alpha_0, num_steps, seed, positions):
    written, counts = positions.choose(np.array(free, dtype=np.int64), alpha_0, num_steps, generator(seed))
    assert len(written) == counts.sum() == len(set(written.tolist()))
    assert set(written.tolist()) <= set(free)
    assert (counts > 0).all()
    if alpha_0 in (0, 1):
        assert len(written) == alpha_0 * len(free)
    assert num_steps is None or len(counts) <= num_steps
    assert num_steps is not None or (counts == 1).all()


def test_positions_written_together_are_a_stride_apart():
    written, counts = Interleaved().choose(np.arange(32), 0.5, 4, generator(0))
    for step in np.split(written, np.cumsum(counts)[:-1]):
        assert set(np.diff(step)) == {8}
    assert len(written) == 16


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, None])
@pytest.mark.parametrize("alpha_0", [0.03, 0.25, 0.7, 0.9, 1.0])
def test_interleaved_positions_are_the_share_that_is_asked_for(alpha_0, num_steps):
    """With few steps strides were rounded: one step at alpha_0 = 0.7 wrote the whole text, and none was left to the
    sequential phase."""
    rng = generator(1)
    counts = [len(Interleaved().choose(np.arange(37), alpha_0, num_steps, rng)[0]) for _ in range(400)]
    assert np.mean(counts) == pytest.approx(37 * alpha_0, abs=0.01 + 4 * np.std(counts) / 20)
    assert np.std(counts) < 7


@QUICK
@given(st.floats(0.05, 1), st.integers(1, 12), SEEDS)
def test_interleaved_positions_of_a_step_are_at_least_a_stride_apart(alpha_0, num_steps, seed):
    written, counts = Interleaved().choose(np.arange(64), alpha_0, num_steps, generator(seed))
    for step in np.split(written, np.cumsum(counts)[:-1]):
        assert (np.diff(step) >= math.floor(num_steps / alpha_0)).all()


# --- the schedule


@QUICK
@given(st.floats(1e-3, 1), SHARES)
def test_time_is_the_inverse_of_alpha(alpha_0, t):
    schedule, t = LogLinear(alpha_0=alpha_0), torch.tensor([t], dtype=torch.float64)
    torch.testing.assert_close(schedule.time(schedule.alpha(t)), t, rtol=0, atol=1e-9)


@QUICK
@given(SHARES, st.floats(0.01, 0.99))
def test_the_derivative_and_the_weight_are_those_of_alpha(alpha_0, t):
    schedule, t = LogLinear(alpha_0=alpha_0), torch.tensor([t], dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha, t)
    assert float(slope) == pytest.approx(schedule.derivative)
    assert float(schedule.weight(t.detach())) == pytest.approx(-float(slope) / (1 - float(alpha.detach())))
    assert schedule.derivative <= 0


def test_diffusion_begins_with_almost_nothing_and_ends_with_its_share():
    ends = LogLinear(alpha_0=0.25).alpha(torch.tensor([0.0, 1.0]).double())
    assert ends.tolist() == pytest.approx([0.25, 0.25 * EPSILON])


@pytest.mark.parametrize("alpha_0", [-0.1, 1.5, math.nan])
def test_an_impossible_share_is_refused(alpha_0):
    with pytest.raises(ValueError, match=r"alpha_0 must lie in \[0, 1\]"):
        LogLinear(alpha_0=alpha_0)


@QUICK
@given(SEEDS, st.integers(1, 50))
def test_stratified_times_fall_one_into_each_stratum(seed, total):
    u = torch.from_numpy(uniforms(total, seed))
    t = stratified_times(u, torch.arange(total, dtype=torch.float64), total)
    assert ((t >= EPSILON) & (t <= 1)).all()
    strata = ((t - EPSILON) / (1 - EPSILON) * total).floor().long().clamp(max=total - 1)
    assert sorted(strata.tolist()) == list(range(total))


@QUICK
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 10**6), st.integers(1, 200))
def test_spread_times_leave_no_hole_larger_than_three_strata(shift, start, count):
    index = torch.arange(start, start + count, dtype=torch.float64)
    t = ((spread_times(shift, index) - EPSILON) / (1 - EPSILON)).sort().values
    assert t[0] >= 0 and t[-1] < 1 + 1e-12
    assert torch.cat((t.diff(), t[:1] + 1 - t[-1:])).max() < 3 / count


@QUICK
@given(SEEDS, st.integers(0, 9), st.integers(0, 50), st.integers(1, 5))
def test_what_rows_share_is_the_same_for_all_of_them(seed, step, start, rows):
    parts = [Noise(seed=seed, step=step, start=a, stop=a + rows, total=99).shared(3) for a in (start, start + rows)]
    assert parts[0] == parts[1] and 0 <= parts[0] < 1
    assert parts[0] != Noise(seed=seed, step=step + 1, start=0, stop=1, total=1).shared(3)


@QUICK
@given(st.integers(0, 40), SHARES, STEPS, SEEDS)
def test_counts_of_steps_sum_to_at_most_the_positions_there_are(count, alpha_0, num_steps, seed):
    counts = reveal_counts(count, alpha_0, num_steps, generator(seed))
    assert (counts > 0).all() and counts.sum() <= count
    assert num_steps is None or len(counts) <= num_steps
    if alpha_0 == 1:
        assert counts.sum() == count
    if alpha_0 == 0:
        assert counts.sum() == 0


@pytest.mark.parametrize("num_steps", [None, 1, 5])
def test_diffusion_writes_its_share_on_average(num_steps):
    counts = [reveal_counts(100, 0.3, num_steps, generator(seed)).sum() for seed in range(400)]
    assert np.mean(counts) == pytest.approx(30, abs=4 * math.sqrt(100 * 0.3 * 0.7 / 400))


# --- random numbers


@QUICK
@given(SEEDS, st.integers(0, 5), st.integers(1, 9), st.integers(0, 6), st.integers(1, 6))
def test_the_noise_of_a_row_is_its_own_whichever_batch_asks(seed, purpose, columns, start, rows):
    whole = Noise(seed=seed, step=3, start=0, stop=12, total=12).uniform(purpose, columns)
    part = Noise(seed=seed, step=3, start=start, stop=start + rows, total=12).uniform(purpose, columns)
    assert torch.equal(part, whole[start : start + rows])
    assert ((whole >= 0) & (whole < 1)).all()


@QUICK
@given(SEEDS, st.integers(1, 9), st.integers(0, 30), st.integers(0, 6), st.integers(1, 6))
def test_noise_by_position_does_not_depend_on_how_many_columns_are_asked_for(seed, columns, more, start, rows):
    how = {"seed": seed, "step": 3, "total": 12, "by_position": True}
    whole = Noise(start=0, stop=12, **how).uniform(1, columns + more)
    part = Noise(start=start, stop=start + rows, **how).uniform(1, columns)
    assert torch.equal(part, whole[start : start + rows, :columns])
    assert whole.unique().numel() == whole.numel()


def test_different_keys_give_different_numbers():
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**32,), (2**32 + 1,), (1, 1), (0, 0, 0)]
    assert len({uniforms(1, *key)[0] for key in keys}) == len(keys)
    assert np.array_equal(uniforms(3, 7), uniforms(9, 7)[:3])


# --- draws


def counted(logits, options: Draw, samples: int = 20_000) -> np.ndarray:
    """The share of each id among draws with evenly spread numbers: exact up to 1 / samples."""
    grid = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    tokens = draw(torch.as_tensor(logits).float().expand(samples, -1), grid, options)
    return np.bincount(tokens.numpy(), minlength=len(logits)) / samples


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-8, 8) | st.just(-math.inf), min_size=1, max_size=9), st.sampled_from([1.0, 0.5, 2.0]))
def test_a_draw_is_exact(logits, temperature):
    if max(logits) == -math.inf:
        logits[0] = 0.0
    expected = (torch.tensor(logits).double() / temperature).softmax(0).numpy()
    shares = counted(logits, Draw(temperature=temperature))
    assert np.abs(shares - expected).max() <= 1.01 / 20_000 + 1e-6
    assert (shares[expected == 0] == 0).all()


@pytest.mark.parametrize("vocab", [255, 256, 257, 511, 513, 1000])
def test_draws_at_every_border_of_a_block_are_exact(vocab):
    """The sum has two levels: ids on both sides of a block's end, and in a last block that is not full."""
    logits = torch.full((vocab,), -math.inf)
    kept = [place for place in (0, 254, 255, 256, 510, 511, 512, vocab - 1) if place < vocab]
    logits[kept] = torch.arange(len(kept)).float()
    expected = logits.double().softmax(0).numpy()
    assert np.abs(counted(logits, Draw()) - expected).max() < 1e-4
    assert set(np.flatnonzero(counted(logits, Draw()))) == set(kept)


@pytest.mark.parametrize("vocab", [50_258])
def test_the_tail_of_a_large_vocabulary_is_drawn_as_often_as_it_weighs(vocab):
    """Half of the weight lies on ids of 1e-5 each: Gumbel noise in float32 would draw too few of them."""
    logits = torch.zeros(1, vocab)
    logits[0, 7] = math.log(vocab - 1)
    samples = 4000
    grid = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    tokens = torch.cat([draw(logits.expand(500, -1), grid[at : at + 500], Draw()) for at in range(0, samples, 500)])
    assert float((tokens != 7).double().mean()) == pytest.approx(0.5, abs=1e-3)
    tail = tokens[tokens != 7].double()
    assert float(tail.mean()) == pytest.approx(vocab / 2, rel=1e-2)
    assert len(tail.unique()) == len(tail)


@QUICK
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=8), st.floats(0, 1, exclude_max=True))
def test_ids_without_probability_are_never_drawn(logits, u):
    logits = torch.tensor([float(x) if x > 0 else -math.inf for x in logits] + [0.0, -math.inf])
    extremes = torch.tensor([u, 0.0, 1 - 2**-53], dtype=torch.float64)
    for options in (Draw(), Draw(temperature=0.0), Draw(top_k=20), Draw(top_p=0.99), Draw(top_k=2, top_p=0.5)):
        tokens = draw(logits.expand(3, -1).clone(), extremes, options)
        assert torch.isfinite(logits[tokens]).all()


@QUICK
@given(st.permutations([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), st.integers(1, 8))
def test_top_k_keeps_the_likeliest_ids_in_their_proportions(logits, k):
    kept = np.argsort(logits)[::-1][:k]
    expected = np.zeros(6)
    expected[kept] = np.exp(np.array(logits)[kept])
    shares = counted(logits, Draw(top_k=k), 5000)
    assert np.abs(shares - expected / expected.sum()).max() < 3e-4


def nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """The smallest set of the likeliest ids that holds at least `top_p`."""
    order = np.argsort(-probabilities, kind="stable")
    before = np.concatenate(([0.0], probabilities[order].cumsum()[:-1]))
    kept = np.zeros_like(probabilities)
    kept[order[before < top_p]] = probabilities[order[before < top_p]]
    return kept / kept.sum()


@QUICK
@given(st.permutations([0.0, 0.5, 1.1, 2.0, 3.2, 3.9]), st.floats(0.01, 1), st.integers(1, 7) | st.none())
def test_top_p_keeps_the_smallest_set_that_holds_its_share(logits, top_p, top_k):
    probabilities = torch.tensor(logits).double().softmax(0).numpy()
    if top_k is not None:
        probabilities[np.argsort(-probabilities)[top_k:]] = 0
        probabilities /= probabilities.sum()
    held = np.sort(probabilities)[::-1].cumsum()
    if np.abs(held - top_p).min() < 1e-6:
        return  # on the border rounding decides
    expected = nucleus(probabilities, top_p)
    shares = counted(logits, Draw(top_p=top_p, top_k=top_k), 5000)
    assert np.abs(shares - expected).max() < 3e-4
    assert set(np.flatnonzero(shares)) <= set(np.flatnonzero(expected))


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_of_a_large_flat_vocabulary_is_exact(top_p):
    """More ids than are looked at before the whole row is sorted."""
    vocab = 3000
    logits = torch.linspace(0, 1, vocab).flip(0)
    probabilities = logits.double().softmax(0)
    kept = int((probabilities.cumsum(0) - probabilities < top_p).sum())
    shares = counted(logits, Draw(top_p=top_p), 6000)
    assert abs(int(np.flatnonzero(shares).max()) + 1 - kept) <= 1
    assert np.abs(shares - nucleus(probabilities.numpy(), top_p)).max() < 1.1 / 6000


@QUICK
@given(SEEDS)
def test_rows_with_options_of_their_own_are_drawn_as_if_alone(seed):
    rng = generator(seed)
    logits, u = torch.from_numpy(rng.normal(size=(6, 9))).float(), torch.from_numpy(rng.random(6))
    options = [Draw(), Draw(temperature=0.0), Draw(top_k=2), Draw(top_p=0.5), Draw(), Draw(temperature=0.7)]
    together = draw_rows(logits, u, options)
    alone = [int(draw(logits[row : row + 1], u[row : row + 1], options[row])) for row in range(6)]
    assert together.tolist() == alone


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [-math.inf, -math.inf]])
def test_a_row_that_cannot_be_drawn_from_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or no token left"):
        draw(torch.tensor([[0.0, 1.0], bad]), torch.tensor([0.5, 0.5]).double(), Draw())
