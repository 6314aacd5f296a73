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
from dataclasses import dataclass, replace
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
    """Nats a token over texts, with the standard error over texts and draws together (as for other texts of the kind),
    and the Monte Carlo error of the draws alone (as for these texts; None where one draw a text cannot tell)."""

    kind: Kind
    nats_per_token: float
    standard_error: float
    num_tokens: int
    num_texts: int
    samples: int = 1
    monte_carlo_error: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    def bits_per_byte(self, num_bytes: int) -> float:
        """Comparable across tokenizers; `num_bytes` is the size of the scored text in UTF-8."""
        return self.nats_per_token * self.num_tokens / num_bytes / math.log(2)


@torch.no_grad()
def nelbo(network: Network, algorithm: Algorithm, batch: Batch, noise: Noise) -> Float64[Tensor, "batch"]:
    """One Monte Carlo estimate of the negative ELBO of each text, in nats, the same however far it is padded. Exact
    for AR."""
    nats = torch.zeros(len(batch.tokens), dtype=torch.float64)
    for view in algorithm.bound(batch, replace(noise, by_position=True), network.config.mask_id):
        rows = objective.scores_of_view(network, view.to(network.device))
        nats += rows.cpu().double().sum(1)  # in this order: not every device has float64
    return nats


@torch.no_grad()
def log_likelihood(network: Network, algorithm: Algorithm, batch: Batch, noise: Noise) -> Float64[Tensor, "batch"]:
    """Exact log-likelihood of each text, in nats, under one order of writing: the method's only one (AR), or one drawn
    with `noise` (Eso-LM). ValueError for methods that have a bound only (see `Algorithm.one_pass`)."""
    order = algorithm.orders(batch, replace(noise, by_position=True))
    view = algorithm.exact(batch, order, network.config.mask_id)
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
    kind: Kind = "importance-weighted bound"
    return -combined(kind, draws(network, algorithm, batch, noise, kind, samples))


def draws(
    network: Network, algorithm: Algorithm, batch: Batch, noise: Noise, kind: Kind, samples: int
) -> Float64[Tensor, "batch sample"]:
    """What `combined` makes a measure of, in nats: estimates of the NELBO, or -log p under each of `samples` orders.

    Draw `k` is that of `noise.step + k`, so that more samples keep the draws of fewer.
    """
    if kind == "NELBO":
        each = [nelbo(network, algorithm, batch, replace(noise, step=noise.step + k)) for k in range(samples)]
    else:
        each = [-log_likelihood(network, algorithm, batch, replace(noise, step=noise.step + k)) for k in range(samples)]
    return torch.stack(each, dim=1)


def combined(kind: Kind, each: Float64[Tensor, "batch sample"]) -> Float64[Tensor, "batch"]:
    """The measure of each text, in nats: the mean of draws, or minus the log of the mean likelihood."""
    if kind == "importance-weighted bound":
        return math.log(each.shape[1]) - torch.logsumexp(-each, dim=1)
    return each.mean(1)


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
    sizes of the batches nor on how far each is padded."""
    found, tokens, at = [], [], 0
    for batch in batches:
        noise = Noise(seed=seed, step=0, start=at, stop=at + len(batch.tokens), total=at + len(batch.tokens))
        found.append(draws(network, algorithm, batch, noise, kind, samples))
        tokens.append(batch.scored.sum(1))
        at = noise.stop
    if not found:
        raise ValueError("there is no text to score")
    return summary(torch.cat(found), torch.cat(tokens).double(), kind)


def summary(each: Float64[Tensor, "text sample"], tokens: Float64[Tensor, "text"], kind: Kind) -> Estimate:
    """The ratio of sums over texts, its standard error from the spread of the texts about it, and the error of the
    draws alone. ArithmeticError for a score that is not finite."""
    nats, (texts, samples) = combined(kind, each), each.shape
    count = float(tokens.sum())
    if not count:
        raise ValueError("there is no token to score: every one is given or padding")
    refuse_not_finite(each)
    mean = float(nats.sum()) / count
    spread = float((nats - mean * tokens).square().sum())
    return Estimate(
        kind=kind,
        nats_per_token=mean,
        standard_error=math.sqrt(spread * texts / (texts - 1)) / count if texts > 1 else math.nan,
        num_tokens=int(count),
        num_texts=texts,
        samples=samples,
        monte_carlo_error=_error_of_draws(kind, each, count),
    )


def refuse_not_finite(each: Float64[Tensor, "text sample"], first: int = 0) -> None:
    """ArithmeticError for a score that is not finite, by the number of its text (the first of these is `first`)."""
    bad = (~each.isfinite()).nonzero()
    if len(bad):
        text, draw = (int(place) for place in bad[0])
        raise ArithmeticError(
            f"the score of text {first + text} is {float(each[text, draw])}: the weights are damaged, or too large for "
            "this dtype"
        )


def _error_of_draws(kind: Kind, each: Float64[Tensor, "text sample"], num_tokens: float) -> float | None:
    """From the spread of each text's own draws; for the log of a mean by its first-order expansion."""
    samples = each.shape[1]
    if kind == "exact":
        return 0.0
    if samples == 1:
        return None
    if kind == "importance-weighted bound":
        each = torch.softmax(-each, dim=1) * samples  # each likelihood over their mean
    return math.sqrt(float(each.var(1).sum()) / samples) / num_tokens
