"""How likely a continuation is after its context: exactly where a method can say so, else by a bound.

    log p(y | x)  =  sum_l log p(y_l | x, y_<l)               AR, or alpha_0 = 0: one pass
    log p(y | x) >=  log mean_k p(y | x, order k)             orders, drawn as the method draws them to write
    log p(y | x) >=  -E[sum of weighted cross-entropies]      NELBO, the mean of draws

The context is given, as a prompt is: clean, read by all that follows, never scored. An order takes one pass where the
method has such a pass (Eso-LM (B)), else a pass for each token: the sampler is made to write the continuation. With
more orders the second rises to log p(y | x) of writing one token a step, and of a single token it is exact; the third
stays where it is, and its draws are noisy where there are few tokens. A continuation has the same draws whatever else
is scored, so that the answers to one question are compared under the same ones.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from esolm import likelihood, objective
from esolm.algorithms.algorithm import Algorithm, Batch, Request
from esolm.draw import Draw
from esolm.inference import Network
from esolm.likelihood import Kind
from esolm.model import seed_of
from esolm.noise import Noise
from esolm.sample import Writer


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Tokens that are given, and tokens after them that are scored: one at least."""

    given: Sequence[int]
    scored: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """`orders` of the importance-weighted bound (0: the NELBO), `samples` of the NELBO; rows scored `at_once`."""

    orders: int = 16
    samples: int = 16
    seed: int = 0
    at_once: int = 16

    def __post_init__(self) -> None:
        values = (("orders", self.orders, 0), ("samples", self.samples, 1), ("batch_size", self.at_once, 1))
        problems = [f"{name} must be at least {least}, got {value}" for name, value, least in values if value < least]
        if problems:
            raise ValueError("; ".join(problems))
        seed_of(self.seed, 0)

    def kind(self, algorithm: Algorithm, *, long: bool) -> Kind:
        """What it is for a method. `long` texts, which nobody has the time to write token by token for each order, have
        the NELBO where an order takes more than one pass."""
        if algorithm.bound_is_exact:
            return "exact"
        return "importance-weighted bound" if self.orders and (algorithm.one_pass or not long) else "NELBO"


def windows(ids: Sequence[int], start: int, *, length: int, context: int) -> list[Pair]:
    """Pairs of at most `length` tokens in which every token from `start` on is scored once, in order. A pair reads at
    least `context` tokens before those it scores, where there are so many; the last reads all that fit."""
    found = []
    while start < len(ids):
        stop = min(start - min(context, start) + length, len(ids))
        found.append(Pair(given=ids[max(0, stop - length) : start], scored=ids[start:stop]))
        start = stop
    return found


def log_likelihoods(
    network: Network, algorithm: Algorithm, pairs: Sequence[Pair], measure: Measure, *, long: bool = False
) -> Iterator[float]:
    """Log-likelihood of each continuation after its context in nats, or a lower bound of it: see `Measure.kind`.

    ArithmeticError for one that is not finite.
    """
    kind = measure.kind(algorithm, long=long)
    step = measure.at_once if kind == "exact" else 1
    for at in range(0, len(pairs), step):
        part = pairs[at : at + step]
        if kind == "exact":
            noise = Noise(seed=0, step=0, start=0, stop=len(part), total=len(part))  # nothing is drawn
            each = likelihood.nelbo(network, algorithm, _batch(algorithm, part), noise)[:, None]
        else:
            each = _draws(network, algorithm, part[0], measure, kind)[None]
        likelihood.refuse_not_finite(each, at)
        yield from (-likelihood.combined(kind, each)).tolist()


def greedy(
    network: Network, algorithm: Algorithm, pairs: Sequence[Pair], *, num_steps: int | None, seed: int, at_once: int
) -> Iterator[bool]:
    """Whether each continuation is what is written after its context if every token is the likeliest of its row.

    A batch is left as soon as every text in it has differed.
    """
    for at in range(0, len(pairs), at_once):
        part = pairs[at : at + at_once]
        requests = [_request(pair, num_steps=num_steps, seed=seed_of(seed, 0)) for pair in part]
        writer, alive = Writer(network, algorithm, requests), set(range(len(part)))
        while alive and writer.active:
            for reveal in writer.step():
                pair = part[reveal.text]
                wanted = [pair.scored[position - len(pair.given)] for position in reveal.positions]
                if list(reveal.tokens) != wanted:
                    alive.discard(reveal.text)
        yield from (number in alive for number in range(len(part)))


def _draws(
    network: Network, algorithm: Algorithm, pair: Pair, measure: Measure, kind: Kind
) -> Float64[Tensor, "sample"]:
    """What `likelihood.combined` makes a measure of, of one pair. More draws keep those of fewer."""
    total = (
        measure.samples if kind == "NELBO" else measure.orders if len(pair.scored) > 1 else 1
    )  # one token, one order
    found = []
    for start in range(0, total, measure.at_once):
        stop = min(start + measure.at_once, total)
        if kind != "NELBO" and not algorithm.one_pass:
            found.append(-_written(network, algorithm, pair, [seed_of(measure.seed, k) for k in range(start, stop)]))
            continue
        batch = _batch(algorithm, [pair] * (stop - start))
        noise = Noise(seed=measure.seed, step=0, start=start, stop=stop, total=total)
        if kind == "NELBO":
            found.append(likelihood.nelbo(network, algorithm, batch, noise))
        else:
            found.append(-likelihood.log_likelihood(network, algorithm, batch, noise))
    return torch.cat(found)


@torch.inference_mode()
def _written(network: Network, algorithm: Algorithm, pair: Pair, seeds: Sequence[int]) -> Float64[Tensor, "sample"]:
    """Log-probability that the sampler writes this continuation, one token a step, under the plan of each seed."""
    writer = Writer(network, algorithm, [_request(pair, num_steps=None, seed=seed) for seed in seeds])
    ids, total = np.array([*pair.given, *pair.scored]), torch.zeros(len(seeds), dtype=torch.float64)
    while writer.active:
        hidden, text, rank = writer.evaluate()
        request, position = writer.places(text, rank)
        tokens = ids[position]
        rows = objective.log_probabilities(network.logits(hidden))
        found = rows.gather(1, torch.from_numpy(tokens)[:, None].to(rows.device))[:, 0]
        total.index_add_(0, torch.from_numpy(request), found.cpu().double())
        writer.accept(text, rank, tokens)
    return total


def _request(pair: Pair, *, num_steps: int | None, seed: int) -> Request:
    return Request(
        length=len(pair.given) + len(pair.scored),
        given=dict(enumerate(pair.given)),
        num_steps=num_steps,
        draw=Draw(temperature=0.0),
        seed=seed,
        stop_at_end=False,
    )


def _batch(algorithm: Algorithm, pairs: Sequence[Pair]) -> Batch:
    """Pairs padded to the longest, and to a length that the method can take. Nobody reads what pads."""
    lengths = torch.tensor([[len(pair.given), len(pair.given) + len(pair.scored)] for pair in pairs])
    multiple = algorithm.length_multiple
    places = torch.arange(math.ceil(int(lengths.max()) / multiple) * multiple)
    tokens = torch.zeros(len(pairs), len(places), dtype=torch.int64)
    for row, pair in zip(tokens, pairs, strict=True):
        row[: len(pair.given) + len(pair.scored)] = torch.tensor([*pair.given, *pair.scored])
    return Batch(tokens=tokens, given=places < lengths[:, :1], valid=places < lengths[:, 1:])
