"""Block diffusion (BD3-LM, arXiv:2503.09573): blocks left to right, masked diffusion inside each.

    sum_b E_t sum_{l in b masked} (1 / t) (-log p(x_l | z_t of block b, x of the blocks before))

`block_size = 1` writes one token a step from left to right, `block_size = length` is masked diffusion. Finished blocks
are cached. A given token is read by its own block and later ones, not by those before it. A text that is written may
end inside a block, as a padded one does in training.

    z0 z1|z2 z3|x0 x1    z private, x public, stage = position // 2; the last block of x is read by nobody and not fed
    #  # .  .  .  .
    #  # .  .  .  .
    .  . #  #  #  #
    .  . #  #  #  #
    .  . .  .  #  #
    .  . .  .  #  #
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from esolm.algorithms.algorithm import Algorithm, Batch, Plan, Request, View, clean_tokens, padded, refuse
from esolm.denoiser import Config
from esolm.noise import Noise
from esolm.schedule import spread_times, stratified_times
from esolm.types import TextFlags

_TIMES, _MASKS = 0, 1  # purposes of the noise


@dataclass(frozen=True, kw_only=True)
class BD3LM(Algorithm):
    """Masked diffusion inside blocks of `block_size`, autoregression over them."""

    block_size: int = 16

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")

    @property
    def bound_is_exact(self) -> bool:
        return False

    @property
    def one_pass(self) -> bool:
        return False

    @property
    def length_multiple(self) -> int:
        return self.block_size

    def check(self, config: Config) -> None:
        self._num_blocks(config.length)

    def views(self, batch: Batch, noise: Noise, mask_id: int) -> tuple[View, ...]:
        rows, block = self._places(batch, noise)
        blocks = block.shape[1]
        t = stratified_times(noise.uniform(_TIMES, blocks), rows * blocks + block, noise.total * blocks)
        return (self._view(batch, t, noise, mask_id),)

    def bound(self, batch: Batch, noise: Noise, mask_id: int) -> tuple[View, ...]:
        return (self._view(batch, spread_times(noise.shared(_TIMES), *self._places(batch, noise)), noise, mask_id),)

    def _places(self, batch: Batch, noise: Noise) -> tuple[Float64[Tensor, "batch 1"], Float64[Tensor, "1 block"]]:
        """Each text's number in the global batch, and each block's in its text: every block has a time of its own."""
        rows = torch.arange(noise.start, noise.stop, dtype=torch.float64)[:, None]
        return rows, torch.arange(self._num_blocks(batch.tokens.shape[1]), dtype=torch.float64)[None]

    def _view(self, batch: Batch, t: Float64[Tensor, "batch block"], noise: Noise, mask_id: int) -> View:
        mask_probability = t.repeat_interleave(self.block_size, dim=1)
        clean = clean_tokens(batch, 1 - mask_probability, noise.uniform(_MASKS, batch.tokens.shape[1]))
        return self.view_of(batch, clean, mask_probability, mask_id)

    def view_of(
        self, batch: Batch, clean: TextFlags, mask_probability: Float64[Tensor, "batch length"], mask_id: int
    ) -> View:
        """The view for tokens already masked: z, then x without its last block."""
        tokens, length = batch.tokens, batch.tokens.shape[1]
        read = length - self.block_size  # tokens of x that somebody reads
        positions = torch.arange(length).expand_as(tokens)
        stage = positions // self.block_size
        valid = torch.cat((batch.valid, batch.valid[:, :read]), dim=1)
        is_x = (torch.arange(length + read) >= length).expand_as(valid)
        stage, public = padded(torch.cat((stage, stage[:, :read]), dim=1), is_x, valid)
        nothing = torch.zeros_like(tokens[:, :read])
        return View(
            term="diffusion",
            tokens=torch.cat((tokens.where(clean, mask_id), tokens[:, :read]), dim=1),
            positions=torch.cat((positions, positions[:, :read]), dim=1),
            stage=stage,
            public=public,
            targets=torch.cat((tokens, nothing), dim=1),
            weights=torch.cat((~clean / mask_probability, nothing), dim=1).float(),
            num_tokens=int(batch.scored.sum()),
            times=torch.cat((mask_probability, nothing), dim=1),
        )

    def plan(self, request: Request, rng: np.random.Generator) -> Plan:
        refuse(self, request, alpha_0="its blocks are written by diffusion")
        orders, steps = [], []
        fixed, free = request.fixed, request.free
        for begin in range(0, request.length, self.block_size):
            end = min(begin + self.block_size, request.length)
            given = fixed[(fixed >= begin) & (fixed < end)]
            block = free[(free >= begin) & (free < end)]
            written, counts = request.positions.chosen(block, 1.0, request.num_steps, rng, every=True)
            orders += [given, written]
            stops = begin + len(given) + np.cumsum(counts)
            steps += [(begin, stop - count, stop, end) for stop, count in zip(stops, counts, strict=True)]
        closed, start, stop, shown = np.array(steps, dtype=np.int64).reshape(-1, 4).T
        stage = np.arange(request.length) // self.block_size
        return Plan(
            order=np.concatenate(orders),
            token_stage=stage,
            mask_stage=stage,
            masks_public=False,
            shifted=False,
            closed=closed,
            start=start,
            stop=stop,
            shown=shown,
            sequential=np.zeros(len(start), dtype=bool),
        )

    def _num_blocks(self, length: int) -> int:
        if length % self.block_size:
            raise ValueError(
                f"length {length} is not divisible by block_size {self.block_size}: "
                f"use a length of {max(1, length // self.block_size) * self.block_size} or another block_size"
            )
        return length // self.block_size
