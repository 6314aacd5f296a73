"""The named runs: the paper's settings as the paper gives them, the same for every method."""

from dataclasses import replace

import pytest

from esolm import recipes
from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.recipes import METHODS, lm1b, method, owt, shakespeare

PAPER = pytest.mark.parametrize(("recipe", "length", "num_steps"), [(lm1b, 128, 1_000_000), (owt, 1024, 250_000)])


@PAPER
def test_the_papers_runs_have_its_settings(recipe, length, num_steps):
    run = recipe(EsoLM(), vocab_size=50_258)
    network, optim, schedule = run.network, run.optim, run.optim.schedule
    assert (network.layers, network.width, network.heads, network.dropout) == (12, 768, 12, 0.1)
    assert (network.length, network.vocab_size) == (length, 50_258)
    assert (run.batch_size, run.num_steps) == (512, num_steps)
    assert (schedule.peak, schedule.warmup, schedule.decay) == (3e-4, 2500, "constant")
    assert (optim.betas, optim.epsilon, optim.weight_decay) == ((0.9, 0.999), 1e-8, 0.0)
    assert (optim.clip, optim.average) == (1.0, 0.9999)
    assert [schedule.rate(step, num_steps) for step in (1249, 2499, num_steps - 1)] == [1.5e-4, 3e-4, 3e-4]


@pytest.mark.parametrize("recipe", [recipes.demo, shakespeare, lm1b, owt])
def test_a_recipe_gives_every_method_the_same_network_and_time(recipe):
    runs = [recipe(method(name), 300) for name in METHODS]
    assert [type(run.algorithm) for run in runs] == [AR, MDLM, BD3LM, EsoLM, EsoLM]
    assert len({replace(run, algorithm=AR()) for run in runs}) == 1
