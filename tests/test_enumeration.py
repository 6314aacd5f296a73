"""Every text of a tiny vocabulary: what the sampler writes, and what the bounds say, against sums over all texts.

Three tokens, four places, 81 texts. `slow.py` is the other side: the methods by their definitions, plans enumerated.
"""

import itertools
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch

from esolm.algorithms import Request
from esolm.algorithms.algorithm import Batch
from esolm.objective import of_view
from esolm.order import Positions
from esolm.sample import Writer, complete
from slow import BLOCK, Slow, algorithm, chi_square_p, network, plans, steps_of, unchecked

LENGTH = 4
METHODS = ("AR", "MDLM", "BD3LM", "A", "A shuffled", "B")
ORDERS = list(itertools.permutations(range(LENGTH)))
SAMPLES = 1000


@pytest.fixture(autouse=True)
def quick():
    with unchecked():
        yield


@cache
def slow(method: str) -> Slow:
    return Slow(method, network())


@dataclass(frozen=True, kw_only=True)
class InOrder(Positions):
    """Diffusion writes these positions, in this order, `width` at a time."""

    order: tuple[int, ...]
    width: int

    def choose(self, free, alpha_0, num_steps, rng):
        chosen = np.array([position for position in self.order if position in free], dtype=np.int64)
        cuts = np.append(np.arange(0, len(chosen), self.width), len(chosen))
        return chosen, np.diff(cuts)


def planned(method: str, order: tuple[int, ...], width: int, given: tuple[int, ...] = ()) -> tuple:
    """The steps of writing by `InOrder`, by definition."""
    parts = [order] if method != "BD3LM" else [[p for p in order if p // BLOCK == b] for b in range(LENGTH // BLOCK)]
    steps = []
    for part in parts:
        chosen = tuple(position for position in part if position not in given)
        widths = [min(width, len(chosen) - at) for at in range(0, len(chosen), width)]
        steps += steps_of(method, chosen, tuple(widths))
    rest = [position for position in range(LENGTH) if position not in (*given, *order)]
    return (*steps, *(("sequential", (position,)) for position in rest))


@torch.inference_mode()
def forced(method: str, orders, width: int, given: tuple[int, ...] = ()) -> torch.Tensor:
    """`[order, text]`: log-probability of every text when the sampler is made to write it, all of them in one batch."""
    texts, denoiser = slow(method).texts, slow(method).denoiser
    options = [{"positions": InOrder(order=order, width=width)} if method != "AR" else {} for order in orders]
    requests = [
        Request(length=LENGTH, given={place: text[place] for place in given}, **option)
        for option in options
        for text in texts.tolist()
    ]
    by_rank = np.array([algorithm(method).plan(r, np.random.default_rng(0)).order for r in requests[:: len(texts)]])
    writer, total = Writer(denoiser, algorithm(method), requests), torch.zeros(len(requests), dtype=torch.float64)
    while writer.active:
        hidden, row, rank = writer.evaluate()
        tokens = texts[row % len(texts), by_rank[row // len(texts), rank]]
        logits = denoiser.logits(hidden).double()[:, :-1]
        total.index_add_(0, torch.from_numpy(row), logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
        writer.accept(row, rank, tokens.numpy())
    return total.view(len(orders), len(texts))


def assert_probabilities(ours: torch.Tensor, theirs: torch.Tensor, given: tuple[int, ...] = ()) -> None:
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)
    assert float(ours.exp().sum()) == pytest.approx(3 ** len(given), abs=1e-5)


def assert_in_every_order(method: str, orders, width: int, given: tuple[int, ...] = ()) -> None:
    for order, ours in zip(orders, forced(method, orders, width, given), strict=True):
        assert_probabilities(ours, slow(method).log_probabilities(planned(method, order, width, given), given), given)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("method", ["MDLM", "BD3LM", "A", "A shuffled", "B"])
def test_the_sampler_gives_all_texts_together_probability_one_in_every_order(method, width):
    assert_in_every_order(method, ORDERS, width)


@pytest.mark.parametrize("method", ["A", "B"])
def test_the_sequential_phase_reads_what_diffusion_wrote_on_either_side(method):
    assert_in_every_order(method, list(itertools.permutations(range(LENGTH), 2)), 2)


def test_the_sampler_of_ar_gives_all_texts_together_probability_one():
    assert_in_every_order("AR", [()], 1)


@pytest.mark.parametrize(
    ("method", "given", "orders"),
    [
        ("AR", (0, 1), [()]),
        ("MDLM", (1, 3), [(2, 0), (0, 2)]),
        ("BD3LM", (1, 3), [(2, 0), (0, 2)]),
        ("BD3LM", (2,), [(1, 0, 3), (3, 0, 1)]),
        ("A", (0, 2), [(3,), ()]),
        ("A", (1, 3), [(2, 0), (0, 2)]),
        ("B", (0, 2), [(3,), ()]),
        ("B", (1, 3), [(2, 0), (0, 2)]),
    ],
)
def test_given_tokens_are_read_by_all_that_is_written(method, given, orders):
    assert_in_every_order(method, orders, 2, given)


@pytest.mark.parametrize("given", [(), (0,), (1, 3)])
@pytest.mark.parametrize("method", ["A", "B"])
def test_the_exact_likelihood_is_that_of_writing_one_by_one(method, given):
    """In (B) by either phase, in every order."""
    for order in itertools.permutations([place for place in range(LENGTH) if place not in given]):
        ours = exact(method, (*given, *order), given)
        one_by_one = tuple(("sequential", (position,)) for position in order)
        assert_probabilities(ours, slow(method).log_probabilities(one_by_one, given), given)
        if method == "B":
            assert_probabilities(ours, slow(method).log_probabilities(planned(method, order, 1, given), given), given)


@pytest.mark.parametrize("given", [(), (0, 1)])
def test_the_exact_likelihood_of_ar_is_the_samplers(given):
    theirs = slow("AR").log_probabilities(planned("AR", (), 1, given), given)
    assert_probabilities(exact("AR", tuple(range(LENGTH)), given), theirs, given)


@torch.inference_mode()
def exact(method: str, order: tuple[int, ...], given: tuple[int, ...]) -> torch.Tensor:
    texts = slow(method).texts
    flags = torch.zeros_like(texts).bool()
    flags[:, list(given)] = True
    batch = Batch(tokens=texts, given=flags, valid=torch.ones_like(flags))
    view = algorithm(method).exact(batch, torch.tensor(order).expand_as(texts), slow(method).mask_id)
    return -of_view(slow(method).denoiser, view)[1].double().sum(1)


def cases():
    for method in METHODS:
        shares = (0.0, 0.5, 1.0) if method in ("A", "B") else (0.5,)  # shuffled, (A) differs in diffusion only
        steps = (None, 2) if method != "AR" else (None,)
        prompts = ((), (1, 3)) if method != "AR" else ((), (0, 1))
        yield from itertools.product([method], shares, steps, prompts)


@pytest.mark.parametrize(("method", "alpha_0", "num_steps", "given"), list(cases()))
def test_the_sampler_writes_each_text_as_often_as_it_should(method, alpha_0, num_steps, given):
    """With its own random plans: the expected share of a text is a sum over all plans, each with its probability."""
    reference, prompt = slow(method), (2, 0, 1, 2)
    free = tuple(place for place in range(LENGTH) if place not in given)
    expected = torch.zeros(len(reference.texts), dtype=torch.float64)
    for probability, plan in plans(method, free, alpha_0, num_steps, LENGTH):
        expected += probability * reference.log_probabilities(plan, given).exp()
    expected[(reference.texts != torch.tensor(prompt))[:, list(given)].any(1)] = 0
    assert float(expected.sum()) == pytest.approx(1)
    known = {place: prompt[place] for place in given}
    options = {"num_steps": num_steps} if method != "AR" else {}
    requests = [Request(length=LENGTH, given=known, seed=seed, **options) for seed in range(SAMPLES)]
    texts = complete(reference.denoiser, algorithm(method, alpha_0), requests)
    counts = Counter(tuple(text.tokens.tolist()) for text in texts)
    counted = torch.tensor([counts[tuple(text)] for text in reference.texts.tolist()])
    assert int(counted.sum()) == SAMPLES
    assert chi_square_p(counted, SAMPLES * expected) > 1e-4
