"""Eso-LM (arXiv:2506.01928): diffusion writes a share `alpha_0` of the text in any order, the rest is written left to
right, reading its left context and all that diffusion wrote.

    loss = E_{z_0} sum_{l masked} -log p(x_l | clean z_0, x_{<l})                           sequential term
         + E_t E_{z_t} sum_{l masked} -(alpha'_t / (1 - alpha_t)) log p(x_l | z_t)          diffusion term

(B) attends causally in generation order, so every token's keys and values are computed once; in (A) clean tokens read
each other both ways, so only the sequential phase caches. Ranks: clean tokens first, then masked ones.

    diffusion, clean a b, masks m m       sequential, clean a b, to write c d: masks, then x without its last row
    (B) # . . .     (A) # # . .           (B) # . # # .     (A) # . # # .    mask of c
        # # . .         # # . .               . # # # #         . # # # #    mask of d
        # # # .         # # # .               . . # . .         . . # # .    a
        # # # #         # # # #               . . # # .         . . # # .    b
                                              . . # # #         . . # # #    c
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from esolm.algorithms.algorithm import (
    Algorithm,
    Batch,
    Plan,
    Request,
    View,
    clean_tokens,
    padded,
    share_of_batch,
)
from esolm.noise import Noise
from esolm.order import apply, by_group, ramp
from esolm.schedule import LogLinear, spread_times, stratified_times
from esolm.types import TextFlags, Texts

_TIMES, _MASKS, _ORDER = 0, 1, 2  # purposes of the noise


@dataclass(frozen=True, kw_only=True)
class EsoLM(Algorithm):
    """Eso-LM. `batch_split` is the share of a batch that goes to the diffusion term; `low_variance` drops the weight
    of that term in training, never in the bound. `shuffle_masks`: in (A) diffusion's masks stand left to right as their
    row of the drawing says, or in random order as in the authors' training scripts (`diffusion_shuffle`) and always in
    (B)."""

    variant: Literal["A", "B"] = "B"
    alpha_0: float = 0.25
    batch_split: float = 0.5
    low_variance: bool = False
    shuffle_masks: bool = False

    def __post_init__(self) -> None:
        LogLinear(alpha_0=self.alpha_0)
        if self.variant not in ("A", "B"):
            raise ValueError(f"variant must be A or B, got {self.variant!r}")
        if self.shuffle_masks and self.variant == "B":
            raise ValueError("shuffle_masks is a choice of (A): (B) always shuffles them, so leave it out")
        if not 0 < self.batch_split < 1:
            raise ValueError(f"batch_split must lie between 0 and 1, got {self.batch_split}")

    @property
    def bound_is_exact(self) -> bool:
        return self.alpha_0 == 0

    @property
    def one_pass(self) -> bool:
        return self.variant == "B" or self.alpha_0 == 0

    @property
    def length_multiple(self) -> int:
        return 1

    def views(self, batch: Batch, noise: Noise, mask_id: int) -> tuple[View, ...]:
        share = self.alpha_0 if self.alpha_0 in (0, 1) else self.batch_split
        diffused, index, total = share_of_batch(noise, share)
        if share == self.batch_split and total in (0, noise.total):
            raise ValueError(
                f"a batch of {noise.total} cannot be split between two terms at {share}: raise the batch size"
            )
        # ranks of one order serve both terms: a row's random numbers are its own, whichever term it is in
        length = batch.tokens.shape[1]
        times, masks, keys = (noise.uniform(p, n) for p, n in ((_TIMES, 1), (_MASKS, length), (_ORDER, length)))
        views = []
        if bool(diffused.any()):
            t = stratified_times(times[diffused], index[diffused][:, None], total)
            views.append(
                self.diffusion(
                    batch[diffused],
                    t,
                    masks[diffused],
                    keys[diffused],
                    mask_id,
                    weighted=not self.low_variance,
                )
            )
        if not bool(diffused.all()):
            views.append(self.sequential(batch[~diffused], masks[~diffused], keys[~diffused], mask_id))
        return tuple(views)

    def bound(self, batch: Batch, noise: Noise, mask_id: int) -> tuple[View, ...]:
        length = batch.tokens.shape[1]
        index = torch.arange(noise.start, noise.stop, dtype=torch.float64)[:, None]
        t = spread_times(noise.shared(_TIMES), index)
        masks, keys = noise.uniform(_MASKS, length), noise.uniform(_ORDER, length)
        views = []
        if self.alpha_0 > 0:
            views.append(self.diffusion(batch, t, masks, keys, mask_id, weighted=True))
        if self.alpha_0 < 1:
            views.append(self.sequential(batch, masks, keys, mask_id))
        return tuple(views)

    def exact(self, batch: Batch, order: Int64[Tensor, "batch length"], mask_id: int) -> View:
        """As `Algorithm.exact`: writing one by one in the sequential phase, given tokens read as a clean block.

        In (B) diffusion that writes one token a step gives the same; in (A) it rereads all clean tokens both ways,
        which no single pass does, so there this is the sampler's likelihood where diffusion writes nothing.
        """
        return self.sequential_of(batch, batch.scored, order, mask_id)

    def orders(self, batch: Batch, noise: Noise) -> Int64[Tensor, "batch length"]:
        """Given tokens, then a share of about `alpha_0` shuffled (what diffusion writes), then the rest in reading
        order. ValueError for (A) unless it writes nothing by diffusion: see `exact`."""
        if not self.one_pass:
            raise ValueError(
                f"EsoLM (A) with alpha_0 {self.alpha_0} rereads what diffusion wrote in each step, which one pass "
                "cannot score: use its bound (NELBO)"
            )
        length = batch.tokens.shape[1]
        alpha = torch.full((len(batch.tokens), 1), self.alpha_0, dtype=torch.float64)
        masked = ~clean_tokens(batch, alpha, noise.uniform(_MASKS, length))
        left_to_right = ramp(length).expand_as(batch.tokens)
        return _generation_order(batch, masked, clean_keys=noise.uniform(_ORDER, length), masked_keys=left_to_right)

    def diffusion(
        self,
        batch: Batch,
        t: Float64[Tensor, "batch 1"],
        uniform: Float64[Tensor, "batch length"],
        keys: Float64[Tensor, "batch length"],
        mask_id: int,
        *,
        weighted: bool,
    ) -> View:
        """The diffusion term at times `t`: clean tokens, then masked ones, both shuffled in (B), in reading order in
        (A) but for `shuffle_masks`."""
        schedule = LogLinear(alpha_0=self.alpha_0)
        masked = ~clean_tokens(batch, schedule.alpha(t), uniform)
        masked_keys = keys if self.shuffle_masks else self._keys(keys)
        order = _generation_order(batch, masked, clean_keys=self._keys(keys), masked_keys=masked_keys)
        weight = schedule.weight(t) if weighted else torch.ones_like(t)
        return replace(self.diffusion_of(batch, masked, order, weight, mask_id), times=t)

    def diffusion_of(
        self, batch: Batch, masked: TextFlags, order: Texts, weight: Float64[Tensor, "batch 1"], mask_id: int
    ) -> View:
        """The diffusion term for tokens already masked (flags in reading order) and ordered."""
        tokens, masked = apply(batch.tokens, order), apply(masked, order)
        rank = torch.arange(order.shape[1]).expand_as(order)
        stage = rank if self.variant == "B" else rank.masked_fill(~masked, 0)
        stage, public = padded(stage, torch.ones_like(masked), apply(batch.valid, order))
        return View(
            term="diffusion",
            tokens=tokens.masked_fill(masked, mask_id),
            positions=order,
            stage=stage,
            public=public,
            targets=tokens,
            weights=(weight * masked).float(),
            num_tokens=int(batch.scored.sum()),
        )

    def sequential(
        self,
        batch: Batch,
        uniform: Float64[Tensor, "batch length"],
        keys: Float64[Tensor, "batch length"],
        mask_id: int,
    ) -> View:
        """The sequential term: clean tokens (shuffled in (B)), then masked ones left to right."""
        alpha = torch.full_like(uniform[:, :1], self.alpha_0)
        masked = ~clean_tokens(batch, alpha, uniform)
        left_to_right = ramp(uniform.shape[1]).expand_as(uniform)
        order = _generation_order(batch, masked, clean_keys=self._keys(keys), masked_keys=left_to_right)
        return self.sequential_of(batch, masked, order, mask_id)

    def sequential_of(self, batch: Batch, masked: TextFlags, order: Texts, mask_id: int) -> View:
        """The sequential term for tokens already masked and ordered: masks of the last ranks, then x but its last row.

        Only rows that carry a loss or are read are fed: `number masked + length - 1`.
        """
        tokens, masked, valid = (apply(values, order) for values in (batch.tokens, masked, batch.valid))
        length = order.shape[1]
        rank = torch.arange(length).expand_as(order)
        stage = rank if self.variant == "B" else rank.masked_fill(~masked, 0)
        first = length - int((masked.cumsum(1) > 0).sum(1).max())  # the first rank that is masked in any text
        targets = masked[:, first:]
        is_x = (torch.arange(2 * length - first - 1) >= length - first).expand(len(order), -1)
        stage, public = padded(
            torch.cat((rank[:, first:], stage[:, :-1]), dim=1),
            is_x,
            torch.cat((targets, valid[:, :-1]), dim=1),
        )
        return View(
            term="sequential",
            tokens=torch.cat((torch.full_like(tokens[:, first:], mask_id), tokens[:, :-1]), dim=1),
            positions=torch.cat((order[:, first:], order[:, :-1]), dim=1),
            stage=stage,
            public=public,
            targets=torch.cat((tokens[:, first:], torch.zeros_like(tokens[:, :-1])), dim=1),
            weights=torch.cat((targets, torch.zeros_like(masked[:, :-1])), dim=1).float(),
            num_tokens=int(batch.scored.sum()),
        )

    def plan(self, request: Request, rng: np.random.Generator) -> Plan:
        alpha_0 = self.alpha_0 if request.alpha_0 is None else request.alpha_0
        LogLinear(alpha_0=alpha_0)
        written, counts = request.positions.chosen(request.free, alpha_0, request.num_steps, rng)
        if self.variant == "A" and not self.shuffle_masks:
            written = _left_to_right_in_steps(written, counts)
        rest = np.setdiff1d(request.free, written)
        stop = len(request.given) + np.cumsum(np.concatenate((counts, np.ones(len(rest), dtype=np.int64))))
        start = stop - np.concatenate((counts, np.ones(len(rest), dtype=np.int64)))
        sequential = np.arange(len(stop)) >= len(counts)
        rank = np.arange(request.length)
        num_clean = len(request.given) + len(written)
        return Plan(
            order=np.concatenate((request.fixed, written, rest)),
            token_stage=rank if self.variant == "B" else np.where(rank < num_clean, 0, rank),
            mask_stage=rank,
            masks_public=True,
            shifted=False,
            closed=start if self.variant == "B" else np.where(sequential, start, 0),
            start=start,
            stop=stop,
            shown=stop,
            sequential=sequential,
        )

    def _keys(self, keys: Float64[Tensor, "batch length"]) -> Float64[Tensor, "batch length"]:
        return keys if self.variant == "B" else ramp(keys.shape[1]).expand_as(keys)


def _left_to_right_in_steps(written: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The masks of a step of (A) read those to their left, as they learn to."""
    step = np.repeat(np.arange(len(counts)), counts)
    return written[np.lexsort((written, step))]


def _generation_order(
    batch: Batch,
    masked: TextFlags,
    *,
    clean_keys: Float64[Tensor, "batch length"],
    masked_keys: Float64[Tensor, "batch length"],
) -> Texts:
    """Given tokens left to right, then clean ones, then masked ones, then padding."""
    group = torch.ones_like(batch.tokens).masked_fill_(batch.given, 0).masked_fill_(masked, 2)
    key = clean_keys.where(~masked, masked_keys)
    key = ramp(key.shape[1]).expand_as(key).where(batch.given, key)
    return by_group(group.masked_fill_(~batch.valid, 3), key)
