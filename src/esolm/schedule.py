"""The noise schedule: which share of a text is clean at time t, its derivative and inverse, and times to draw.

    alpha_t = alpha_0 (1 - (1 - eps) t),   t in [0, 1],   eps = 1e-3         (Eso-LM, section 3; log-linear of MDLM)

At t = 0 a share `alpha_0` is clean (what diffusion writes), at t = 1 almost nothing. It draws no tokens.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

EPSILON = 1e-3  # keeps t away from 0, where the weight of the diffusion term is infinite for alpha_0 = 1
_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples mod 1 fill [0, 1) most evenly
_OF_PARTS = math.sqrt(2)  # no multiple of it is one of the golden ratio, so that no part has the time of another text's


@dataclass(frozen=True, kw_only=True)
class LogLinear:
    """`alpha_t = alpha_0 (1 - (1 - EPSILON) t)`."""

    alpha_0: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha_0 <= 1:
            raise ValueError(
                f"alpha_0 must lie in [0, 1], got {self.alpha_0}: 1 is pure diffusion, 0 pure autoregression"
            )

    def alpha(self, t: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        """Probability that a token is clean at time `t`."""
        return self.alpha_0 * (1 - (1 - EPSILON) * t)

    @property
    def derivative(self) -> float:
        """d alpha_t / dt, the same at every t."""
        return -self.alpha_0 * (1 - EPSILON)

    def time(self, alpha: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        """The time at which a share `alpha` is clean: the inverse of `alpha`."""
        return (1 - alpha / self.alpha_0) / (1 - EPSILON)

    def weight(self, t: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        """Weight of `-log p` in the negative ELBO: `-alpha'_t / (1 - alpha_t)`, positive."""
        return -self.derivative / (1 - self.alpha(t))


def stratified_times(
    uniform: Float64[Tensor, "*shape"], index: Float64[Tensor, "*shape"], total: int
) -> Float64[Tensor, "*shape"]:
    """Times in [EPSILON, 1], one in each of `total` equal strata: `(u/n + i/n) mod 1`, then shifted off zero."""
    return EPSILON + (1 - EPSILON) * ((uniform / total + index / total) % 1)


def spread_times(
    shift: float, index: Float64[Tensor, "*#shape"], part: Float64[Tensor, "*#shape"] | None = None
) -> Float64[Tensor, "*shape"]:
    """Times in [EPSILON, 1], spread evenly over any run of indices: `(shift + index * golden ratio) mod 1`, shifted off
    zero. Parts of a text with times of their own (blocks) are `part * sqrt(2)` apart.

    For scoring: with a uniform `shift` the time of every text is uniform by itself, so that estimates over texts in a
    fixed order are unbiased. Stratified times tie a text to its stratum; in training texts come in random order.
    """
    place = shift + index * _GOLDEN
    return EPSILON + (1 - EPSILON) * ((place if part is None else place + part * _OF_PARTS) % 1)


def reveal_counts(count: int, alpha_0: float, num_steps: int | None, rng: np.random.Generator) -> np.ndarray:
    """How many of `count` masked positions each diffusion step reveals; steps that reveal none are dropped.

    Step from t to s reveals Binomial(what is left, (alpha_s - alpha_t) / (1 - alpha_t)) of them (the ancestral sampler
    of MDLM, as Eso-LM uses it). `num_steps=None` is its limit of one position a step: Binomial(count, alpha_0) ones.
    """
    if num_steps is None:
        total = count if alpha_0 == 1 else int(rng.binomial(count, alpha_0))
        return np.ones(total, dtype=np.int64)
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}: leave it out for one token a step")
    schedule, left, counts = LogLinear(alpha_0=alpha_0), count, []
    alphas = schedule.alpha(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)).tolist()
    for alpha_t, alpha_s in itertools.pairwise(alphas):
        revealed = int(rng.binomial(left, min(1.0, (alpha_s - alpha_t) / (1 - alpha_t))))
        counts.append(revealed)
        left -= revealed
    if alpha_0 == 1:  # nothing is left to the sequential phase, whatever rounding says of the last step
        counts.append(left)
    return np.array([revealed for revealed in counts if revealed], dtype=np.int64)
