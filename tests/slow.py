"""The methods by their definitions, slowly: one uncached pass a step, every reading row and read row written out.

It shares nothing with what it checks but the weights: a transformer in float64 of its own, sets of positions instead
of stages, and plans listed with their probabilities instead of drawn. A state of writing is three tuples of positions:

    clean   given, then written by diffusion, in the order of writing
    line    written by the sequential phase
    masks   what this step writes
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import config as shapes
from torch import Tensor

from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.algorithms.algorithm import Algorithm
from esolm.denoiser import Config, Denoiser

SMALLEST = 1e-3  # the schedule's epsilon, by value: the tests must see it change
BLOCK = 2


def algorithm(method: str, alpha_0: float = 0.5) -> Algorithm:
    """The package's own object for a method's name here."""
    fixed: dict[str, Algorithm] = {"AR": AR(), "MDLM": MDLM(), "BD3LM": BD3LM(block_size=BLOCK)}
    if method == "A shuffled":
        return EsoLM(variant="A", alpha_0=alpha_0, shuffle_masks=True)
    return fixed[method] if method in fixed else EsoLM(variant=method, alpha_0=alpha_0)


@contextmanager
def unchecked() -> Iterator[None]:
    """Without the run-time checks of shapes, which take most of the time where tiny calls come by the thousand."""
    shapes.update("jaxtyping_disable", True)
    yield
    shapes.update("jaxtyping_disable", False)


def network(*, seed: int = 0, vocab_size: int = 4, length: int = 4, width: int = 8, **options) -> Denoiser:
    """A tiny network whose weights are so large that what a row reads changes what it says."""
    config = Config(vocab_size=vocab_size, length=length, width=width, **({"layers": 2, "heads": 2} | options))
    generator = torch.Generator().manual_seed(seed)
    denoiser = Denoiser(config, generator).eval()
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=generator)
    return denoiser


def slow_logits(
    denoiser: Denoiser,
    tokens: Tensor,
    positions: Tensor,
    reads: Tensor,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Logits `[batch, row, vocab]` in float64 of rows `tokens` at `positions`; `reads[q, k]`: does row q read row k?

    A plain transformer: layer norm, rotary angles, softmax written out, GELU (tanh form). `weights` in float64 stand
    in for the denoiser's where gradients are wanted.
    """
    weights = weights or {name: value.detach().double() for name, value in denoiser.state_dict().items()}
    config = denoiser.config
    h = weights["embed.weight"][tokens]
    for layer in range(config.layers):
        block = {k.removeprefix(f"blocks.{layer}."): v for k, v in weights.items() if k.startswith(f"blocks.{layer}.")}
        h = h + _slow_attention(block, _slow_norm(h, block["norm1.weight"]), positions, reads, config.heads)
        inner = F.linear(_slow_norm(h, block["norm2.weight"]), block["up.weight"], block["up.bias"])
        gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        h = h + F.linear(gelu, block["down.weight"], block["down.bias"])
    return F.linear(_slow_norm(h, weights["norm.weight"]), weights["head.weight"], weights["head.bias"])


def _slow_norm(x: Tensor, weight: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _slow_attention(block: dict[str, Tensor], x: Tensor, positions: Tensor, reads: Tensor, heads: int) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (x @ block["qkv.weight"].T).chunk(3, dim=-1))
    dim = q.shape[-1]
    angle = positions[..., None, None] / 10_000 ** (torch.arange(0, dim, 2).double() / dim)
    q, k = (_turned(part, angle) for part in (q, k))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(dim)
    odds = torch.where(reads, (scores - scores.amax(-1, keepdim=True)).exp(), 0.0)
    mixed = torch.einsum("bhqk,bkhd->bqhd", odds / odds.sum(-1, keepdim=True), v)
    return mixed.flatten(2) @ block["out.weight"].T


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1)


class Slow:
    """The conditionals of one method (AR, MDLM, BD3LM, A, `A shuffled` or B) over every text of a tiny vocabulary."""

    def __init__(self, method: str, denoiser: Denoiser) -> None:
        self.method, self.denoiser = method, denoiser
        self.length, self.mask_id = denoiser.config.length, denoiser.config.mask_id
        self.texts = torch.tensor(list(itertools.product(range(self.mask_id), repeat=self.length)))
        self.log_conditionals = cache(self._log_conditionals)

    def log_probabilities(self, plan: tuple, given: tuple[int, ...]) -> Tensor:
        """Log of the probability of writing each text under a plan, the tokens at `given` being as in that text."""
        total = torch.zeros(len(self.texts), dtype=torch.float64)
        clean, line = given, ()
        for phase, masks in plan:
            total += self.log_conditionals(clean, line, masks).sum(1)
            clean, line = (clean + masks, line) if phase == "diffusion" else (clean, line + masks)
        return total

    def _log_conditionals(self, clean: tuple[int, ...], line: tuple[int, ...], masks: tuple[int, ...]) -> Tensor:
        """`[text, mask]`: log-probability of each text's own token at each of `masks`, read from its other tokens."""
        rows, held, reads = self._rows(clean, line, masks)
        tokens = torch.cat((self.texts, torch.full_like(self.texts[:, :1], self.mask_id)), dim=1)[:, list(held)]
        logits = slow_logits(self.denoiser, tokens, torch.tensor(rows), torch.tensor(reads))
        drawn = [rows.index(mask) for mask in masks]
        logits = logits[:, drawn, : self.mask_id]
        return logits.log_softmax(-1).gather(2, self.texts[:, list(masks), None])[..., 0]

    def _rows(self, clean: tuple, line: tuple, masks: tuple) -> tuple[list[int], list[int], list[list[bool]]]:
        """Position of each row, whose token it holds (-1: the mask), and which rows each reads."""
        if self.method == "AR":
            rows = list(range(masks[0] + 1))
            return rows, [row - 1 for row in rows], [[k <= q for k in rows] for q in rows]
        if self.method == "MDLM":
            rows = list(range(self.length))
            return rows, _held(rows, clean), [[True] * len(rows) for _ in rows]
        if self.method == "BD3LM":
            now = masks[0] // BLOCK
            rows = list(range((now + 1) * BLOCK))
            return rows, _held(rows, clean), [[k // BLOCK <= q // BLOCK for k in rows] for q in rows]
        rows = [*clean, *line, *masks]
        both_ways = 0 if self.method == "B" else len(clean)
        reads = [[k <= q or max(k, q) < both_ways for k in range(len(rows))] for q in range(len(rows))]
        return rows, [*clean, *line, *(-1 for _ in masks)], reads


def _held(rows: list[int], clean: tuple[int, ...]) -> list[int]:
    return [row if row in clean else -1 for row in rows]


def plans(
    method: str, free: tuple[int, ...], alpha_0: float, num_steps: int | None, length: int
) -> Iterator[tuple[float, tuple]]:
    """Every way of writing the `free` positions, with its probability: steps of (phase, positions)."""
    if method == "AR":
        yield 1.0, _left_to_right(free)
    elif method == "BD3LM":
        blocks = [tuple(p for p in free if p // BLOCK == block) for block in range(length // BLOCK)]
        for parts in itertools.product(*(_diffused(method, block, 1.0, num_steps) for block in blocks)):
            yield math.prod(p for p, _ in parts), tuple(step for _, steps in parts for step in steps)
    else:
        alpha_0 = 1.0 if method == "MDLM" else alpha_0
        for probability, steps in _diffused(method, free, alpha_0, num_steps):
            written = {position for _, masks in steps for position in masks}
            yield probability, steps + _left_to_right(tuple(p for p in free if p not in written))


def _left_to_right(positions: tuple[int, ...]) -> tuple:
    return tuple(("sequential", (position,)) for position in positions)


def _diffused(method: str, free: tuple, alpha_0: float, num_steps: int | None) -> Iterator[tuple[float, tuple]]:
    """The diffusion steps: every count, and every ordered choice of that many positions, all as likely."""
    for probability, widths in _widths(len(free), alpha_0, num_steps):
        choices = list(itertools.permutations(free, sum(widths)))
        for choice in choices:
            yield probability / len(choices), tuple(steps_of(method, choice, widths))


def steps_of(method: str, choice: tuple[int, ...], widths: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Positions cut into diffusion steps. The masks of a step of (A) stand left to right, as it learns them."""
    at = 0
    for width in widths:
        masks = choice[at : at + width]
        yield "diffusion", masks if method in ("B", "A shuffled") else tuple(sorted(masks))
        at += width


def _widths(count: int, alpha_0: float, num_steps: int | None) -> Iterator[tuple[float, tuple[int, ...]]]:
    """How many positions each diffusion step writes, with the probability of that."""
    if num_steps is None:
        for total in range(count + 1):
            yield _binomial(total, count, alpha_0), (1,) * total
        return
    alphas = [alpha_0 * (1 - (1 - SMALLEST) * (1 - step / num_steps)) for step in range(num_steps + 1)]
    shares = [(later - now) / (1 - now) for now, later in itertools.pairwise(alphas)]
    for counts in itertools.product(range(count + 1), repeat=num_steps):
        left, probability = count, 1.0
        for revealed, share in zip(counts, shares, strict=True):
            probability *= _binomial(revealed, left, share)
            left -= revealed
        if probability:
            yield probability, tuple(revealed for revealed in counts if revealed)


def _binomial(successes: int, trials: int, share: float) -> float:
    if successes > trials:
        return 0.0
    return math.comb(trials, successes) * share**successes * max(0.0, 1 - share) ** (trials - successes)


def chi_square_p(counts: Tensor, expected: Tensor) -> float:
    """How likely counts as far from the expected ones are: Pearson's test, rare cells put together."""
    rare = expected < 5
    counts, expected = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts.double(), expected))
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))
