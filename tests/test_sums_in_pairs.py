"""Sums in pairs are the same bits, however many ranks share the summands."""

import pytest
import torch
from torch import Tensor, nn

from esolm.pairs import Pairs, taken, total


def summands(count: int) -> list[Tensor]:
    return [*torch.randn(count, 1000, generator=torch.Generator().manual_seed(count))]


@pytest.mark.parametrize("count", [4, 6, 8, 24])
def test_ranks_that_share_the_summands_find_the_sum_that_one_finds(count):
    """Each adds a power of two of them, and then their sums are added."""
    alone = total(summands(count))
    for each in (each for each in (1, 2, 4, 8) if count % each == 0):
        shares = [summands(count)[first : first + each] for first in range(0, count, each)]
        assert torch.equal(total(map(total, shares)), alone)
    assert not torch.equal(sum(summands(count)), alone)  # one after another they are rounded otherwise
    assert torch.allclose(sum(summands(count)), alone, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_no_more_is_kept_than_the_logarithm_of_the_number(count):
    pairs, most = Pairs(), 0
    for part in summands(count):
        pairs.give({"": part})
        most = max(most, len(pairs._held))
    assert most <= count.bit_length()
    pairs.take()
    assert pairs.take() == {}


def test_gradients_that_only_some_portions_have_are_summed():
    model, pairs = nn.ModuleList((nn.Linear(2, 1), nn.Linear(2, 1))), Pairs()
    for used in ((), (0,), (0, 1)):
        for place in used:
            model[place](torch.ones(1, 2)).sum().backward()
        pairs.give(taken(model))
        assert all(parameter.grad is None for parameter in model.parameters())
    found = pairs.take()
    assert [float(found[parameter].mean()) for parameter in model.parameters()] == [2.0, 2.0, 1.0, 1.0]
