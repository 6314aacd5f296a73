"""From logits to tokens: temperature, top-k, top-p, greedy, and exact categorical draws.

One uniform number a row, in float64, is looked up in the cumulative sum of the row's probabilities. Gumbel noise in
float32 would be a hidden temperature: it cannot reach the tail, so rare tokens never come. The sum has two levels
(blocks, then one block), so that no float64 array over the vocabulary is made. A row's token depends on its own logits
and number only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

_BLOCK = 256  # ids summed together; the two levels cost about vocab / 256 and 256 float64 additions
_CANDIDATES = 512  # ids that top-p looks at before it sorts the whole row


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How a token is drawn. `temperature` 0 is greedy; `top_k` and `top_p` keep the likeliest ids, in this order."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature must be at least 0, got {self.temperature}: 0 is greedy, 1 the model's own")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k must be at least 1, got {self.top_k}: leave it out to keep every token")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must lie in (0, 1], got {self.top_p}: 1 keeps every token")
        if problems:
            raise ValueError("; ".join(problems))


def draw_rows(
    logits: Float[Tensor, "row vocab"], uniform: Float64[Tensor, "row"], options: Sequence[Draw]
) -> Int64[Tensor, "row"]:
    """A token for each row, by the row's own options. Ids of logit -inf are never drawn.

    ValueError if a row has NaN or no id left to draw.
    """
    distinct = set(options)
    if len(distinct) == 1:
        return draw(logits, uniform, options[0])
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for option in distinct:
        rows = torch.tensor([other == option for other in options], device=logits.device).nonzero()[:, 0]
        tokens[rows] = draw(logits[rows], uniform[rows], option)
    return tokens


def draw(logits: Float[Tensor, "row vocab"], uniform: Float64[Tensor, "row"], options: Draw) -> Int64[Tensor, "row"]:
    """A token for each row: temperature, then top-k, then top-p, then an exact draw. Sources: arXiv:1904.09751."""
    if options.temperature == 0:
        return logits.argmax(-1)
    if options.temperature != 1:
        logits = logits / options.temperature
    if options.top_k is None and options.top_p == 1:
        return _categorical(_weights(logits), uniform)
    kept, ids = _likeliest(logits, options)
    return ids.gather(1, _categorical(kept, uniform)[:, None])[:, 0]


def _weights(logits: Tensor) -> Tensor:
    """Probabilities up to a factor of the row: exp(logit - largest)."""
    return (logits - logits.amax(-1, keepdim=True)).exp_()


def _categorical(weights: Float[Tensor, "row vocab"], uniform: Float64[Tensor, "row"]) -> Int64[Tensor, "row"]:
    """The first id whose cumulative weight exceeds `uniform` times the row's sum."""
    rows, vocab = weights.shape
    block = min(_BLOCK, vocab)
    whole = vocab // block * block
    sums = weights[:, :whole].view(rows, -1, block).sum(-1, dtype=torch.float64)
    if whole < vocab:
        sums = torch.cat((sums, weights[:, whole:].sum(-1, dtype=torch.float64, keepdim=True)), dim=1)
    total = sums.cumsum(1)
    if not bool((total[:, -1] > 0).all()):  # NaN and an empty row both fail this
        raise ValueError("a row of logits has NaN or no token left to draw: check the model's weights")
    goal = uniform[:, None] * total[:, -1:]
    chosen = torch.searchsorted(total, goal, right=True)
    chosen = _first_with_weight(chosen, sums)
    before = (total - sums).gather(1, chosen)
    places = chosen * block + torch.arange(block, device=weights.device)
    inside = weights.gather(1, places.clamp(max=vocab - 1)).double().masked_fill_(places >= vocab, 0.0)
    place = _first_with_weight(torch.searchsorted(inside.cumsum(1), goal - before, right=True), inside)
    return (chosen * block + place)[:, 0]


def _first_with_weight(index: Int64[Tensor, "row 1"], weights: Float64[Tensor, "row n"]) -> Int64[Tensor, "row 1"]:
    """`index`, or where rounding put it on an empty or absent entry, the last entry before it that has weight."""
    places = torch.arange(weights.shape[1], device=weights.device)
    allowed = (weights > 0) & (places <= index)
    last = torch.where(allowed, places, -1).amax(1, keepdim=True)
    first = (weights > 0).int().argmax(1, keepdim=True)
    return torch.where(last >= 0, last, first)


def _likeliest(logits: Tensor, options: Draw) -> tuple[Tensor, Tensor]:
    """Weights and ids of the ids that top-k and top-p keep, likeliest first; weight 0 where a row keeps fewer."""
    vocab = logits.shape[1]
    weights = _weights(logits)
    count = min(vocab, options.top_k or _CANDIDATES)
    kept, ids = weights.topk(count, dim=-1)
    if options.top_p == 1:
        return kept, ids
    # with top-k, its ids are the whole; without, all ids are, and more must be sorted where few hold too little
    total = (kept if options.top_k else weights).sum(-1, dtype=torch.float64, keepdim=True)
    if not options.top_k and count < vocab:
        reached = kept.sum(-1, dtype=torch.float64) >= options.top_p * total[:, 0]
        if not bool(reached.all()):
            kept, ids = weights.sort(dim=-1, descending=True, stable=True)
    before = kept.cumsum(-1, dtype=torch.float64) - kept
    return kept.masked_fill(before >= options.top_p * total, 0.0), ids
