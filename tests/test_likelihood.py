"""Three measures of a text: batches and padding change none, each is what its name says, errors are calibrated."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.algorithms.algorithm import Batch
from esolm.likelihood import draws, estimate, importance_weighted, log_likelihood, nelbo
from esolm.noise import Noise
from esolm.schedule import EPSILON
from slow import network, slow_logits, unchecked
from test_nelbo import closed_form
from test_nelbo import slow as slow_of

LENGTH, VOCAB, TEXTS = 8, 12, 7
ALGORITHMS = [AR(), MDLM(), BD3LM(block_size=4), EsoLM(variant="A", alpha_0=0.5), EsoLM(variant="B", alpha_0=0.5)]
NAMES = ["AR", "MDLM", "BD3LM", "A", "B"]
METHODS = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=NAMES)
KINDS = [(algorithm, "NELBO") for algorithm in ALGORITHMS] + [
    (AR(), "exact"),
    (EsoLM(alpha_0=0.0), "exact"),
    (EsoLM(variant="B", alpha_0=0.5), "importance-weighted bound"),
]
DENOISER = network(vocab_size=VOCAB, length=LENGTH, width=16)


def some_texts(count: int = TEXTS, seed: int = 0) -> Batch:
    """Random texts of random lengths, padded."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB - 1, (count, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (count, 1), generator=generator)
    valid = torch.arange(LENGTH) < lengths
    return Batch(tokens=tokens, given=torch.zeros_like(valid), valid=valid)


def noise(rows: int, seed: int = 0) -> Noise:
    return Noise(seed=seed, step=0, start=0, stop=rows, total=rows)


@pytest.mark.parametrize(("algorithm", "kind"), KINDS, ids=[f"{type(a).__name__}-{kind}" for a, kind in KINDS])
def test_batches_and_what_padding_holds_change_no_measure(algorithm, kind):
    batch = some_texts()
    whole = estimate(DENOISER, algorithm, [batch], kind=kind, samples=3, seed=5)
    for sizes in ([1] * TEXTS, [3, 4], [1, 6]):
        cuts = list(itertools.pairwise([0, *itertools.accumulate(sizes)]))
        parts = estimate(DENOISER, algorithm, [batch[a:b] for a, b in cuts], kind=kind, samples=3, seed=5)
        assert parts.nats_per_token == pytest.approx(whole.nats_per_token, abs=1e-5)
        assert parts.standard_error == pytest.approx(whole.standard_error, abs=1e-5)
    other = Batch(tokens=batch.tokens.where(batch.valid, 3), given=batch.given, valid=batch.valid)
    padded = estimate(DENOISER, algorithm, [other], kind=kind, samples=3, seed=5)
    assert padded.nats_per_token == pytest.approx(whole.nats_per_token, abs=1e-5)
    assert (whole.num_texts, whole.num_tokens) == (TEXTS, int(batch.valid.sum()))


@pytest.mark.parametrize(("algorithm", "kind"), KINDS, ids=[f"{type(a).__name__}-{kind}" for a, kind in KINDS])
def test_a_short_text_alone_and_padded_beside_a_long_one_has_the_same_draws(algorithm, kind):
    """Rows of noise were as long as the padded text, so every text but the first had others beside a longer one, and so
    had the blocks of BD3-LM their times."""
    batch, found = some_texts(), []
    padded = draws(DENOISER, algorithm, batch, noise(TEXTS, 5), kind, 3)
    for text in range(TEXTS):
        length = int(batch.valid[text].sum())
        length += -length % algorithm.length_multiple
        short = Batch(**{name: part[text : text + 1, :length] for name, part in vars(batch).items()})
        here = Noise(seed=5, step=0, start=text, stop=text + 1, total=1)
        found.append(draws(DENOISER, algorithm, short, here, kind, 3))
    torch.testing.assert_close(torch.cat(found), padded, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [4, 5, 8])
@METHODS
def test_what_a_short_text_shows_is_the_start_of_what_a_longer_one_shows(algorithm, length):
    """Bit for bit: the same tokens masked, with the same weights, in the same order."""
    batch = some_texts(200)
    batch = Batch(tokens=batch.tokens, given=batch.given, valid=(torch.arange(LENGTH) < length).expand(200, -1))
    cut = length + -length % algorithm.length_multiple
    short = Batch(**{name: part[:, :cut] for name, part in vars(batch).items()})
    here = replace(noise(200, 5), by_position=True)
    for long_view, short_view in zip(*(algorithm.bound(b, here, VOCAB - 1) for b in (batch, short)), strict=True):
        for row in range(200):
            shown = [_scored_rows(view, row) for view in (long_view, short_view)]
            assert shown[0] == shown[1]


def _scored_rows(view, row) -> list[tuple]:
    """Position, target, weight and stage of the rows that carry a loss."""
    parts = (view.positions, view.targets, view.weights, view.stage)
    return [each for each in zip(*(part[row].tolist() for part in parts), strict=True) if each[2]]


@METHODS
def test_a_text_is_scored_at_every_time_whatever_its_place_among_the_texts(algorithm):
    """Strata went by place: the first of two texts was scored at t < 0.5 only, the second at t > 0.5 only, in every
    draw and under every seed, so that the NELBO of texts in a fixed order was that of no text."""
    batch = Batch.of(torch.zeros(2, LENGTH, dtype=torch.int64))
    early = torch.zeros(2)
    for seed in range(200):
        for view in algorithm.bound(batch, noise(2, seed), VOCAB - 1):
            weight = view.weights.amax(1)
            if view.term == "diffusion":  # the weight falls with t; at t = 0.5 it is this
                half = 2.0 if not isinstance(algorithm, EsoLM) else 0.5 / (1 - 0.25)
                early += weight > half
    if algorithm != AR():
        assert ((early / 200 - 0.5).abs() < 0.25).all(), early


def test_times_of_texts_in_a_row_lie_evenly():
    """As evenly as strata: no hole of four times the mean distance anywhere."""
    times = []
    for view in MDLM().bound(Batch.of(torch.zeros(64, LENGTH, dtype=torch.int64)), noise(64, 3), VOCAB - 1):
        weight = view.weights.amax(1)
        times = (1 / weight[weight > 0]).sort().values
    assert len(times) > 55
    assert (times.diff() < 4 / 64).all() and times[0] < 4 / 64 + EPSILON and times[-1] > 1 - 4 / 64


def test_an_autoregressive_likelihood_is_the_sum_of_log_softmax():
    batch = some_texts()
    ours = log_likelihood(DENOISER, AR(), batch, noise(TEXTS))
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    shifted = torch.cat((torch.full((TEXTS, 1), VOCAB - 1), batch.tokens[:, :-1]), dim=1)
    logits = slow_logits(DENOISER, shifted, torch.arange(LENGTH).expand(TEXTS, -1), causal)
    each = logits[..., :-1].log_softmax(-1).gather(-1, batch.tokens[..., None])[..., 0]
    torch.testing.assert_close(ours, (each * batch.valid).sum(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(nelbo(DENOISER, AR(), batch, noise(TEXTS)), -ours)


@pytest.mark.parametrize("variant", ["A", "B"])
def test_at_alpha_0_of_zero_bound_and_likelihood_are_one(variant):
    algorithm, batch = EsoLM(variant=variant, alpha_0=0.0), some_texts()
    exact = log_likelihood(DENOISER, algorithm, batch, noise(TEXTS))
    torch.testing.assert_close(nelbo(DENOISER, algorithm, batch, noise(TEXTS)), -exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(importance_weighted(DENOISER, algorithm, batch, noise(TEXTS), 3), exact)


def test_more_orders_tighten_the_bound_and_keep_those_of_fewer():
    algorithm, batch = EsoLM(alpha_0=0.5), Batch.of(some_texts(64).tokens)
    each = torch.stack(
        [
            log_likelihood(DENOISER, algorithm, batch, Noise(seed=0, step=k, start=0, stop=64, total=64))
            for k in range(32)
        ]
    )
    bounds = {k: importance_weighted(DENOISER, algorithm, batch, noise(64), k) for k in (1, 2, 8, 32)}
    for k, bound in bounds.items():
        torch.testing.assert_close(bound, each[:k].exp().mean(0).log(), rtol=0, atol=1e-6)
    means = [float(bound.mean()) for bound in bounds.values()]
    assert means == sorted(means) and means[-1] - means[0] > 0.2
    assert each.std(0).min() > 0.05  # the order matters to this network


def test_orders_are_drawn_as_diffusion_and_then_the_sequential_phase_write():
    batch = some_texts(400)
    batch = Batch(tokens=batch.tokens, given=torch.arange(LENGTH).expand(400, -1) == 2, valid=batch.valid | True)
    orders = EsoLM(alpha_0=0.3).orders(batch, noise(400))
    assert (orders[:, 0] == 2).all()
    assert (orders.sort(1).values == torch.arange(LENGTH)).all()
    # where only one of the others is written by diffusion, or none, the tail is in reading order
    rising = (orders[:, 1:].diff(dim=1) > 0).all(1).float().mean()
    assert float(rising) == pytest.approx(_share_in_reading_order(0.3, LENGTH - 1), abs=0.08)


def _share_in_reading_order(alpha_0: float, free: int) -> float:
    """Of orders: diffusion wrote the first k positions, in reading order by chance."""
    return sum(
        math.comb(free, k) * alpha_0**k * (1 - alpha_0) ** (free - k) / (math.comb(free, k) * math.factorial(k))
        for k in range(free + 1)
    )


@pytest.mark.parametrize(("method", "alpha_0"), [("MDLM", 1.0), ("BD3LM", 1.0), ("A", 0.5), ("B", 0.5)])
def test_the_standard_error_covers_the_truth_as_often_as_it_should(method, alpha_0):
    """Texts drawn at random from all 81 of the enumeration, whose NELBO is known in closed form."""
    with unchecked():
        reference = slow_of(method)
        truth = float(closed_form(reference, alpha_0, ()).mean()) / 4
        algorithm = EsoLM(variant=method, alpha_0=0.5) if method in "AB" else MDLM()
        algorithm = BD3LM(block_size=2) if method == "BD3LM" else algorithm
        assert 0.90 <= covered(reference.denoiser, algorithm, reference.texts, truth) <= 0.995


def covered(denoiser, algorithm, population, truth: float, repeats: int = 200) -> float:
    """The share of evaluations of 300 texts whose interval of 1.96 standard errors holds the truth."""
    inside = 0
    for repeat in range(repeats):
        chosen = torch.from_numpy(np.random.default_rng(repeat).integers(0, len(population), 300))
        found = estimate(denoiser, algorithm, [Batch.of(population[chosen])], seed=repeat)
        inside += abs(found.nats_per_token - truth) < 1.96 * found.standard_error
    return inside / repeats


def test_the_standard_error_of_texts_of_all_lengths_is_that_of_a_ratio():
    population = some_texts(4000, seed=1)
    nats = -log_likelihood(DENOISER, AR(), population, noise(4000))
    truth = float(nats.sum()) / int(population.valid.sum())
    inside = 0
    with unchecked():
        for repeat in range(200):
            chosen = torch.from_numpy(np.random.default_rng(repeat).integers(0, 4000, 50))
            found = estimate(DENOISER, AR(), [population[chosen]], kind="exact")
            inside += abs(found.nats_per_token - truth) < 1.96 * found.standard_error
    assert 0.90 <= inside / 200 <= 0.995


def test_one_text_has_no_standard_error_that_is_known():
    assert math.isnan(estimate(DENOISER, MDLM(), [some_texts(1)]).standard_error)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: estimate(DENOISER, AR(), []), "there is no text to score"),
        (lambda: estimate(DENOISER, MDLM(), [some_texts()], kind="exact"), "MDLM has no exact likelihood in one pass"),
        (
            lambda: importance_weighted(DENOISER, BD3LM(block_size=4), some_texts(), noise(TEXTS), 2),
            "BD3LM has no exact likelihood in one pass",
        ),
        (lambda: importance_weighted(DENOISER, EsoLM(), some_texts(), noise(TEXTS), 0), "samples must be at least 1"),
        (
            lambda: log_likelihood(DENOISER, EsoLM(variant="A", alpha_0=0.5), some_texts(), noise(TEXTS)),
            r"EsoLM \(A\) with alpha_0 0.5 rereads",
        ),
        (lambda: estimate(DENOISER, AR(), [nothing_to_score()]), "every one is given or padding"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_its_reason(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def nothing_to_score() -> Batch:
    batch = some_texts()
    return Batch(tokens=batch.tokens, given=batch.valid, valid=batch.valid)
