"""A training step holds a chunk of logits and a tile of scores, never all: peak memory of a process that takes one."""

import json
import subprocess
import sys

import pytest

GIB = 2**30
METHODS = {
    "esolm-b": "EsoLM(alpha_0=0.5)",
    "esolm-a": 'EsoLM(variant="A", alpha_0=0.5)',
    "sequential": "EsoLM(alpha_0=0.0)",
    "mdlm": "MDLM()",
    "bd3lm": "BD3LM(block_size=16)",
    "ar": "AR()",
}
STEP = """
import json, sys
import torch
from esolm import objective, tiles
from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.algorithms.algorithm import Batch
from esolm.denoiser import Config, Denoiser
from esolm.optim import Config as Optim, Optimizer, WeightAverage
from esolm.train import Run, autocast, learn

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

algorithm, sizes, batch_size, dtype, chunk, kept, recompute = eval(sys.argv[1])
objective._CHUNK_ROWS = chunk or objective._CHUNK_ROWS
tiles._SCORES_KEPT = kept or tiles._SCORES_KEPT
network = Denoiser(Config(**sizes), torch.Generator().manual_seed(0))
network.recompute = recompute
run = Run(algorithm=algorithm, network=network.config, num_steps=2, batch_size=batch_size, dtype=dtype)
optimizer, average = Optimizer(network, Optim()), WeightAverage(network)
shape = (batch_size, network.config.length)
batch = Batch.of(torch.randint(0, network.config.mask_id, shape, generator=torch.Generator().manual_seed(1)))
before = peak()
with autocast(run, network.device):
    learn(run, network, batch, 0)
optimizer.clip()
optimizer.update(1e-4)
average.update(1)
print(json.dumps([before, peak()]))
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")


def peak(
    method: str, sizes: dict, batch_size: int, *, dtype="float32", chunk=None, kept=None, again=False
) -> tuple[int, int]:
    """Peak bytes of a process before its step (weights, optimizer, torch) and after it."""
    case = f"({METHODS[method]}, {sizes!r}, {batch_size}, {dtype!r}, {chunk}, {kept}, {again})"
    done = subprocess.run([sys.executable, "-c", STEP, case], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    return before, after


SMALL = {"vocab_size": 50_258, "length": 256, "width": 16, "layers": 1, "heads": 1}
LOGITS = 4 * 8 * 256 * SMALL["vocab_size"]  # bytes of all logits of 8 texts: 412 MB


def test_a_step_holds_a_chunk_of_logits():
    before, after = peak("ar", SMALL, 8)
    assert after - before < 0.6 * LOGITS


def test_the_bound_on_logits_is_one_that_all_logits_break():
    before, after = peak("ar", SMALL, 8, chunk=2**40)
    assert after - before > LOGITS


LONG = {"vocab_size": 100, "length": 1024, "width": 32, "layers": 3, "heads": 4}
SCORES = 4 * 4 * 4 * (2 * 1024 - 16) ** 2  # bytes of one layer's scores, 4 texts: 264 MB


@pytest.mark.parametrize("method", ["bd3lm", "sequential"])
def test_a_step_over_long_texts_holds_no_scores(method):
    before, after = peak(method, LONG, 4)
    assert after - before < SCORES


def test_the_bound_on_scores_is_one_that_kept_scores_break():
    before, after = peak("bd3lm", LONG, 4, kept=2**40)
    assert after - before > SCORES


DEEP = {"vocab_size": 100, "length": 256, "width": 64, "layers": 12, "heads": 4}


def test_recomputing_saves_what_the_insides_of_blocks_keep():
    """More than the MLPs alone keep: what enters and what leaves the activation. What enters a block stays."""
    (before, kept), (start, recomputed) = (peak("ar", DEEP, 16, again=again) for again in (False, True))
    mlps = 12 * 16 * 256 * 2 * 4 * 64 * 4  # layers, texts, rows, numbers of 4 widths, bytes: 101 MB
    assert (kept - before) - (recomputed - start) > 1.5 * mlps


FULL = {"vocab_size": 50_258, "length": 1024, "width": 384, "layers": 6, "heads": 6}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", METHODS)
def test_sixteen_texts_of_1024_tokens_train_within_6_gib(method):
    _, after = peak(method, FULL, 16, dtype="auto")
    assert after < 6 * GIB
