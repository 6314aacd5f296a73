"""From logits to tokens: temperature, top-k, top-p, greedy, and exact categorical draws.

One uniform number a row, in float64, is looked up in the cumulative sum of the row's probabilities. Gumbel noise in
float32 would be a hidden temperature: it cannot reach the tail, so rare tokens never come. The sum has two levels
(blocks, then one block), so that no float64 array over the vocabulary is made. A row's token depends on its own logits
and number only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from esolm.whole import whole

_BLOCK, _LARGEST_BLOCK = 256, 2048  # ids summed together: the two levels cost vocab / block and block float64 additions
NOTHING_TO_DRAW = "a row of logits has NaN or no token left to draw: check the model's weights"
_COLDEST, _HOTTEST = 1e-30, 1e30  # beyond them a logit over the temperature is no float32
_CANDIDATES = 512  # ids that top-p looks at before it sorts the whole row


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How a token is drawn. `temperature` 0 is greedy; `top_k` and `top_p` keep the likeliest ids, in this order."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if not (self.temperature == 0 or _COLDEST <= self.temperature <= _HOTTEST):
            problems.append(
                f"temperature must be at least 0 and, above it, lie in [{_COLDEST:g}, {_HOTTEST:g}], got "
                f"{self.temperature}: 0 is greedy, 1 the model's own"
            )
        if self.top_k is not None and whole("top_k", self.top_k) < 1:
            problems.append(f"top_k must be at least 1, got {self.top_k}: leave it out to keep every token")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must lie in (0, 1], got {self.top_p}: 1 keeps every token")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def plain(self) -> bool:
        """Is a token drawn from all ids, at some temperature?"""
        return self.temperature > 0 and self.top_k is None and self.top_p == 1


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
        most, tokens = logits.max(-1)
        if not bool((most > -torch.inf).all()):  # NaN fails this as well
            raise ValueError(NOTHING_TO_DRAW)
        return tokens
    if options.temperature != 1:
        logits = logits / options.temperature
    if options.plain:
        return _categorical(torch.softmax(logits, -1), uniform)
    kept, ids = _likeliest(logits, options)
    return ids.gather(1, _categorical(kept, uniform)[:, None])[:, 0]


def _categorical(weights: Float[Tensor, "row vocab"], uniform: Float64[Tensor, "row"]) -> Int64[Tensor, "row"]:
    """The first id whose cumulative weight exceeds `uniform` times the row's sum.

    What is as long as the vocabulary is done where the weights are; the two searches, in a few hundred numbers a row,
    are done by numpy, which takes a third of the time of as many small tensors.
    """
    rows, vocab = weights.shape
    size = _block_size(vocab)
    blocks = (F.pad(weights, (0, -vocab % size)) if vocab % size else weights).view(rows, -1, size)
    sums = blocks.sum(-1, dtype=torch.float64).cpu().numpy()
    total = sums.cumsum(1)
    if not (total[:, -1] > 0).all():  # NaN and an empty row both fail this
        raise ValueError(NOTHING_TO_DRAW)
    row, goal = np.arange(rows), uniform.cpu().numpy() * total[:, -1]
    block = _search(total, goal)
    inside = blocks[row, torch.from_numpy(block)].double().cpu().numpy()
    place = _search(inside.cumsum(1), goal - (total[row, block] - sums[row, block]))
    return torch.from_numpy(block * size + place).to(weights.device)


@cache
def _block_size(vocab: int) -> int:
    """Ids to sum together: as many as divide the vocabulary, so that nothing is padded, if there is such a number."""
    sizes = range(min(vocab, _LARGEST_BLOCK), _BLOCK, -1)
    return next((size for size in sizes if vocab % size == 0), min(vocab, _BLOCK))


def _search(total: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """In each row, the first entry whose cumulative weight exceeds the goal. A goal that rounding has put outside
    [0, sum) is put back, so the entry that is found has weight."""
    inside = np.clip(goal, 0, np.nextafter(total[:, -1], 0))
    found: np.ndarray = (total <= inside[:, None]).sum(1)
    return found


def _likeliest(logits: Tensor, options: Draw) -> tuple[Tensor, Tensor]:
    """Weights and ids of the ids that top-k and top-p keep, likeliest first; weight 0 where a row keeps fewer."""
    vocab = logits.shape[1]
    weights = logits.softmax(-1)
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
