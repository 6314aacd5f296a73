"""Continuations after a context: every one of a tiny vocabulary, against sums over all plans of writing it."""

import itertools
import math

import pytest
import torch

from esolm.algorithms.algorithm import Request
from esolm.conditional import Measure, Pair, greedy, log_likelihoods, windows
from esolm.draw import Draw
from esolm.model import seed_of
from esolm.sample import complete
from slow import Slow, algorithm, network, plans, unchecked

LENGTH = 4
METHODS = ("AR", "MDLM", "BD3LM", "A", "B")
SLOW = {method: Slow(method, network()) for method in METHODS}


@pytest.fixture(autouse=True)
def quick():
    with unchecked():
        yield


def expected(method: str, given: int) -> torch.Tensor:
    """`[text]`: log p of the rest of every text after its first `given` tokens, over all plans."""
    free, slow = tuple(range(given, LENGTH)), SLOW[method]
    total = torch.zeros(len(slow.texts), dtype=torch.float64)
    for probability, plan in plans(method, free, 0.5, None, LENGTH):
        total += probability * slow.log_probabilities(plan, tuple(range(given))).exp()
    assert float(total.sum()) == pytest.approx(3**given)  # one for each context
    return total.log()


def pairs_of(method: str, given: int, every: int = 1) -> list[Pair]:
    return [Pair(given=text[:given], scored=text[given:]) for text in SLOW[method].texts[::every].tolist()]


def scores(method: str, pairs: list[Pair], **options) -> torch.Tensor:
    long = options.pop("long", False)
    found = log_likelihoods(SLOW[method].denoiser, algorithm(method), pairs, Measure(**options), long=long)
    return torch.tensor(list(found), dtype=torch.float64)


@pytest.mark.parametrize("given", [0, 1, 3])
def test_autoregression_says_it_exactly(given):
    torch.testing.assert_close(scores("AR", pairs_of("AR", given)), expected("AR", given), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_token_is_exact_under_one_order(method):
    ours = scores(method, pairs_of(method, LENGTH - 1), orders=1)
    torch.testing.assert_close(ours, expected(method, LENGTH - 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("given", [0, 1, 2])
@pytest.mark.parametrize("method", ["MDLM", "BD3LM", "A", "B"])
def test_many_orders_are_a_bound_that_rises_to_the_likelihood(method, given):
    every = 20 if given == 0 else 11
    pairs, truth = pairs_of(method, given, every), expected(method, given)[::every]
    bounds = [scores(method, pairs, orders=orders, at_once=384) for orders in (1, 384)]
    torch.testing.assert_close(bounds[1], truth, rtol=0, atol=0.2)
    assert float((bounds[1] - truth).mean().abs()) < 0.05
    one = torch.stack([scores(method, pairs, orders=1, seed=seed) for seed in range(16)]).mean(0)
    assert float((one - truth).mean()) < 0 and bool((one < truth + 0.3).all())


@pytest.mark.parametrize("method", ["MDLM", "BD3LM"])
def test_the_nelbo_is_the_mean_over_orders_and_below_the_likelihood(method):
    """Of diffusion alone: the NELBO's time runs through one token a step, and its mean is that of the orders' logs."""
    pairs, truth = pairs_of(method, 1, 11), expected(method, 1)[::11]
    mean = torch.zeros(len(SLOW[method].texts), dtype=torch.float64)
    for probability, plan in plans(method, (1, 2, 3), 0.5, None, LENGTH):
        mean += probability * SLOW[method].log_probabilities(plan, (0,))
    ours = scores(method, pairs, orders=0, samples=2048, at_once=2048)
    assert bool((mean[::11] < truth).all())
    assert float((ours - mean[::11]).mean().abs()) < 0.1


@pytest.mark.parametrize("method", ["MDLM", "BD3LM", "A"])
def test_long_texts_have_the_nelbo_where_an_order_takes_many_passes(method):
    pairs = pairs_of(method, 1, 20)
    long = scores(method, pairs, samples=8, orders=8, long=True)
    torch.testing.assert_close(long, scores(method, pairs, samples=8, orders=0))
    assert Measure().kind(algorithm(method), long=True) == "NELBO"
    assert Measure().kind(algorithm("B"), long=True) == "importance-weighted bound"


@pytest.mark.parametrize("method", METHODS)
def test_a_continuation_has_the_same_number_whatever_else_is_scored(method):
    """And draws that are made a few at a time are the same draws."""
    pairs = [pair for given in (0, 1, 2) for pair in pairs_of(method, given, 27)]
    together = scores(method, pairs, orders=6)
    for number, pair in enumerate(pairs):
        torch.testing.assert_close(scores(method, [pair], orders=6, at_once=4)[0], together[number], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_continuation_is_greedy_if_it_is_what_is_written_so(method):
    denoiser, method_ = SLOW[method].denoiser, algorithm(method)
    prompts = [list(prompt) for prompt in itertools.product(range(3), repeat=2)]
    texts = [tuple(text) for text in SLOW[method].texts.tolist()]
    for seed in range(4):  # in the order of the seed
        requests = [
            Request(length=LENGTH, given=dict(enumerate(prompt)), draw=Draw(temperature=0), seed=seed_of(seed, 0))
            for prompt in prompts
        ]
        likeliest = [tuple(text.tokens.tolist()) for text in complete(denoiser, method_, requests)]
        found = greedy(denoiser, method_, pairs_of(method, 2), num_steps=None, seed=seed, at_once=16)
        assert [text for text, same in zip(texts, found, strict=True) if same] == likeliest


def test_greedy_autoregression_takes_the_likeliest_token_of_each_row():
    """By the conditionals themselves, which share nothing with the sampler."""
    texts, conditionals = SLOW["AR"].texts, SLOW["AR"].log_conditionals
    same = torch.ones(len(texts), dtype=torch.bool)
    for place in (2, 3):
        each = conditionals((), tuple(range(place)), (place,))[:, 0].view(-1, 3, 3 ** (LENGTH - 1 - place))
        same &= (each == each.amax(1, keepdim=True)).flatten()
    found = list(greedy(SLOW["AR"].denoiser, algorithm("AR"), pairs_of("AR", 2), num_steps=None, seed=0, at_once=7))
    assert found == same.tolist()


@pytest.mark.parametrize("context", [0, 1, 3])
@pytest.mark.parametrize(("count", "start"), [(0, 0), (1, 0), (4, 0), (5, 0), (13, 0), (13, 2), (13, 11), (9, 9)])
def test_windows_score_every_token_once_and_the_last_reads_all_that_fits(count, start, context):
    found = windows(list(range(count)), start, length=4, context=context)
    assert [token for pair in found for token in pair.scored] == list(range(start, count))
    for pair in found:
        assert len(pair.scored) >= 1 and len(pair.given) + len(pair.scored) <= 4
        first = pair.scored[0]
        assert list(pair.given) == list(range(first - len(pair.given), first))
        assert len(pair.given) >= min(context, first)
    if found:
        assert len(found[-1].given) + len(found[-1].scored) == min(4, count)


def test_what_cannot_be_a_measure_is_refused_in_one_line():
    with pytest.raises(
        ValueError, match="orders must be at least 0, got -1; samples must be at least 1, got 0"
    ) as told:
        Measure(orders=-1, samples=0)
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="seed"):
        Measure(seed=-1)


def test_a_score_that_is_not_finite_is_no_score():
    broken = network()
    with torch.no_grad():
        broken.head.weight.fill_(math.nan)
    with pytest.raises(ArithmeticError, match="damaged"):
        list(log_likelihoods(broken, algorithm("AR"), pairs_of("AR", 1), Measure()))
