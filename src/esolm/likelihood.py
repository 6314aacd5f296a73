"""Three names for three things: the exact log-likelihood, the NELBO, and the importance-weighted bound.

    exact       log p(x) under one order of writing, one token a step       AR; Eso-LM under a given order
    NELBO       -log p(x) <= E[sum of weighted cross-entropies]             every method; Monte Carlo, with its error
    weighted    log p(x) >= log mean_k p(x | order k)                       Eso-LM (B); tighter with more orders

They ask the network for different conditionals. A row of the NELBO's diffusion term also reads masks, as it learns to:
in MDLM and BD3-LM those of the text or block, in Eso-LM those before it in generation order, shuffled in (B). A row of
its sequential term, and every row of the exact pass, reads tokens only, as writing one by one does. So with one order
the weighted bound may lie below or above the NELBO: they bound the likelihoods of two ways of writing.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from esolm import objective
from esolm.algorithms.algorithm import Algorithm, Batch
from esolm.inference import Network
from esolm.noise import Noise

Kind = Literal["exact", "NELBO", "importance-weighted bound"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Nats a token over texts, with the standard error over texts (and over the draws of a Monte Carlo estimate)."""

    kind: Kind
    nats_per_token: float
    standard_error: float
    num_tokens: int
    num_texts: int
    samples: int = 1

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    def bits_per_byte(self, num_bytes: int) -> float:
        """Comparable across tokenizers; `num_bytes` is the size of the scored text in UTF-8."""
        return self.nats_per_token * self.num_tokens / num_bytes / math.log(2)


@torch.inference_mode()
def nelbo(network: Network, algorithm: Algorithm, batch: Batch, noise: Noise) -> Float64[Tensor, "batch"]:
    """One Monte Carlo estimate of the negative ELBO of each text, in nats. Exact for AR."""
    nats = torch.zeros(len(batch.tokens), dtype=torch.float64)
    for view in algorithm.bound(batch, noise, network.config.mask_id):
        rows = objective.scores_of_view(network, view.to(network.device))
        nats += rows.cpu().double().sum(1)  # in this order: not every device has float64
    return nats


@torch.inference_mode()
def log_likelihood(network: Network, algorithm: Algorithm, batch: Batch, noise: Noise) -> Float64[Tensor, "batch"]:
    """Exact log-likelihood of each text, in nats, under one order of writing: the method's only one (AR), or one drawn
    with `noise` (Eso-LM). ValueError for methods that have a bound only (see `Algorithm.one_pass`)."""
    view = algorithm.exact(batch, algorithm.orders(batch, noise), network.config.mask_id)
    rows = objective.scores_of_view(network, view.to(network.device))
    return -rows.cpu().double().sum(1)


def importance_weighted(
    network: Network, algorithm: Algorithm, batch: Batch, noise: Noise, samples: int
) -> Float64[Tensor, "batch"]:
    """Log of the mean, over `samples` orders, of the likelihood of each text: a lower bound of log p in nats.

    Order `k` is drawn at `noise.step + k`, so more samples keep the orders of fewer.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    each = [log_likelihood(network, algorithm, batch, _later(noise, k)) for k in range(samples)]
    return torch.logsumexp(torch.stack(each), dim=0) - math.log(samples)


def estimate(
    network: Network,
    algorithm: Algorithm,
    batches: Iterable[Batch],
    *,
    kind: Kind = "NELBO",
    samples: int = 1,
    seed: int = 0,
) -> Estimate:
    """A measure over texts, `samples` draws each. A text's numbers depend on its place among the texts, not on the
    sizes of the batches. Texts must all be padded to one length, for which the random numbers are drawn."""
    nats, tokens, at = [], [], 0
    for batch in batches:
        noise = Noise(seed=seed, step=0, start=at, stop=at + len(batch.tokens), total=at + len(batch.tokens))
        nats.append(_measure(network, algorithm, batch, noise, kind, samples))
        tokens.append(batch.scored.sum(1))
        at = noise.stop
    if not nats:
        raise ValueError("there is no text to score")
    return _summary(torch.cat(nats), torch.cat(tokens).double(), kind, samples)


def _measure(
    network: Network, algorithm: Algorithm, batch: Batch, noise: Noise, kind: Kind, samples: int
) -> Float64[Tensor, "batch"]:
    if kind == "exact":
        return -log_likelihood(network, algorithm, batch, noise)
    if kind == "NELBO":
        draws = [nelbo(network, algorithm, batch, _later(noise, k)) for k in range(samples)]
        return torch.stack(draws).mean(0)
    return -importance_weighted(network, algorithm, batch, noise, samples)


def _summary(nats: Float64[Tensor, "text"], tokens: Float64[Tensor, "text"], kind: Kind, samples: int) -> Estimate:
    """The ratio of sums, and its standard error from the spread of the texts about it."""
    texts, count = len(nats), float(tokens.sum())
    if not count:
        raise ValueError("there is no token to score: every one is given or padding")
    mean = float(nats.sum()) / count
    spread = float((nats - mean * tokens).square().sum())
    error = math.sqrt(spread * texts / (texts - 1)) / count if texts > 1 else math.nan
    return Estimate(
        kind=kind,
        nats_per_token=mean,
        standard_error=error,
        num_tokens=int(count),
        num_texts=texts,
        samples=samples,
    )


def _later(noise: Noise, draws: int) -> Noise:
    return Noise(seed=noise.seed, step=noise.step + draws, start=noise.start, stop=noise.stop, total=noise.total)
