"""What holds of every method's views: any lengths, prompts and padding; any cut of a batch into parts."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esolm.algorithms import AR, BD3LM, MDLM, EsoLM, Request
from esolm.algorithms.algorithm import Batch, share_of_batch
from esolm.likelihood import nelbo
from esolm.noise import Noise, generator
from esolm.objective import of_view
from slow import network, unchecked

QUICK = settings(deadline=None, max_examples=60)
VOCAB, LONGEST = 6, 8
MASK_ID = VOCAB - 1
DENOISER = network(vocab_size=VOCAB, length=LONGEST)
SHARES = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)
METHODS = st.one_of(
    st.builds(AR),
    st.builds(MDLM, low_variance=st.booleans()),
    st.builds(BD3LM, block_size=st.just(1)),
    st.builds(EsoLM, variant=st.sampled_from("AB"), alpha_0=SHARES, low_variance=st.booleans()),
    st.builds(EsoLM, variant=st.just("A"), alpha_0=SHARES, shuffle_masks=st.just(True)),
)


@st.composite
def batches(draw) -> Batch:
    """Two to four texts of one length, some padded, some with given tokens, some wholly given."""
    texts, length = draw(st.integers(2, 4)), draw(st.integers(1, LONGEST))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    valid = torch.arange(length) < torch.from_numpy(rng.integers(1, length + 1, (texts, 1)))
    flags = torch.from_numpy(rng.random((texts, length)) < draw(st.sampled_from([0.0, 0.3, 1.0])))
    tokens = torch.from_numpy(rng.integers(0, MASK_ID, (texts, length)))
    return Batch(tokens=tokens, given=flags & valid, valid=valid)


def noise_of(batch: Batch, seed: int) -> Noise:
    return Noise(seed=seed, step=0, start=0, stop=len(batch.tokens), total=len(batch.tokens))


@QUICK
@given(METHODS, batches(), st.integers(0, 2**40))
def test_any_batch_is_learned_from_and_scored(algorithm, batch, seed):
    """Texts of one token, texts wholly given, terms in which nothing is masked."""
    noise = noise_of(batch, seed)
    with unchecked(), torch.no_grad():
        views = algorithm.views(batch, noise, MASK_ID)
        assert sum(view.num_tokens for view in views) == int(batch.scored.sum())
        for view in views:
            loss, rows = of_view(DENOISER, view)
            assert math.isfinite(float(loss)) and bool((rows >= 0).all())
            assert bool((view.weights >= 0).all()) and bool((view.targets[view.weights > 0] < MASK_ID).all())
        nats = nelbo(DENOISER, algorithm, batch, noise)
    assert bool(torch.isfinite(nats).all()) and bool((nats >= 0).all())
    assert not bool(nats[~batch.scored.any(1)].any())


@QUICK
@given(METHODS, st.integers(1, LONGEST), st.integers(0, 2**40), st.none() | st.integers(1, 9), st.data())
def test_a_plan_writes_every_free_position_once(algorithm, length, seed, num_steps, data):
    places = st.lists(st.integers(0, length - 1), unique=True)
    known = range(data.draw(st.integers(0, length))) if isinstance(algorithm, AR) else data.draw(places)
    options = {} if isinstance(algorithm, AR) else {"num_steps": num_steps}
    request = Request(length=length, given=dict.fromkeys(known, 0), **options)
    plan = algorithm.plan(request, generator(seed))
    assert sorted(plan.order.tolist()) == list(range(length))
    written = [int(plan.order[rank]) for a, b in zip(plan.start, plan.stop, strict=True) for rank in range(a, b)]
    assert sorted(written) == request.free.tolist()
    assert (plan.start < plan.stop).all() and (plan.stop <= plan.shown).all()
    assert (np.diff(plan.closed) >= 0).all() and (np.diff(plan.start) >= 0).all()
    assert (plan.closed <= plan.start + plan.shifted).all()  # only what is written enters the cache


@QUICK
@given(st.integers(1, 300), st.floats(0.01, 0.99), st.data())
def test_a_share_of_a_batch_is_spread_evenly_over_it_and_numbered_through(total, share, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=5)))
    parts = [
        share_of_batch(Noise(seed=0, step=0, start=a, stop=b, total=total), share)
        for a, b in itertools.pairwise([0, *cuts, total])
    ]
    assert {count for _, _, count in parts} == {int(total * share + 1e-9)}
    numbers = torch.cat([index[chosen] for chosen, index, _ in parts])
    assert torch.equal(numbers, torch.arange(parts[0][2], dtype=torch.float64))
    for chosen, _, _ in parts:
        assert abs(int(chosen.sum()) - share * len(chosen)) <= 1 + 1e-6


@pytest.mark.parametrize(
    "algorithm",
    [MDLM(), BD3LM(block_size=2), EsoLM(batch_split=0.3), EsoLM(variant="A", alpha_0=1.0)],
    ids=["MDLM", "BD3LM", "B", "A"],
)
@pytest.mark.parametrize("cuts", [(0, 5, 10, 20), (0, 1, 2, 20), tuple(range(21))])
def test_micro_batches_are_shown_what_the_whole_batch_is(algorithm, cuts):
    """Times are stratified over the global batch, and over the rows of the diffusion term alone."""
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, MASK_ID, (20, LONGEST)))

    def shown(start: int, stop: int) -> list[torch.Tensor]:
        noise = Noise(seed=1, step=2, start=start, stop=stop, total=20)
        views = algorithm.views(Batch.of(tokens[start:stop]), noise, MASK_ID)
        return [
            row for view in views if view.term == "diffusion" for row in torch.stack((view.tokens, view.weights), 1)
        ]

    whole, parts = shown(0, 20), [row for a, b in itertools.pairwise(cuts) for row in shown(a, b)]
    assert torch.equal(torch.stack(whole), torch.stack(parts))
    if not isinstance(algorithm, BD3LM):
        weights = torch.stack(whole)[:, 1].amax(1)
        alpha_0 = algorithm.alpha_0 if isinstance(algorithm, EsoLM) else 1.0
        t = (1 - (1 - 0.999 * alpha_0 / weights) / alpha_0) / 0.999
        strata = ((t - 1e-3) / 0.999 * len(whole)).floor()
        seen = weights > 0  # a text in which nothing is masked tells no time
        assert torch.equal(strata[seen], torch.arange(len(whole))[seen].float())
