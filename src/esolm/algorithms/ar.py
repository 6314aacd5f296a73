"""Autoregression: each token from those before it.

    -log p(x) = sum_l -log p(x_l | x_{<l})

The input is the text shifted by one with the mask in front, as the authors' baseline has it. Exact; no diffusion.

    rank  0 1 2 3     tokens fed: mask x0 x1 x2
    0     # . . .     all rows public, stage = rank
    1     # # . .
    2     # # # .
    3     # # # #
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from esolm.algorithms.algorithm import Algorithm, Batch, Plan, Request, View, padded, refuse
from esolm.noise import Noise


@dataclass(frozen=True, kw_only=True)
class AR(Algorithm):
    """Left to right. It writes after a prefix; other given tokens it refuses."""

    @property
    def bound_is_exact(self) -> bool:
        return True

    @property
    def one_pass(self) -> bool:
        return True

    @property
    def length_multiple(self) -> int:
        return 1

    def views(self, batch: Batch, noise: Noise, mask_id: int) -> tuple[View, ...]:
        return (_view(batch, mask_id),)

    def bound(self, batch: Batch, noise: Noise, mask_id: int) -> tuple[View, ...]:
        return (_view(batch, mask_id),)

    def exact(self, batch: Batch, order: Int64[Tensor, "batch length"], mask_id: int) -> View:
        if bool((order != torch.arange(order.shape[1], device=order.device)).any()):
            raise ValueError("AR writes left to right only: give the order 0, 1, 2, ...")
        return _view(batch, mask_id)

    def orders(self, batch: Batch, noise: Noise) -> Int64[Tensor, "batch length"]:
        return torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)

    def plan(self, request: Request, rng: np.random.Generator) -> Plan:
        refuse(
            self,
            request,
            alpha_0="it is 0 for it",
            num_steps="it writes one token a step",
            positions="it writes left to right",
        )
        given = len(request.given)
        if given and int(request.fixed[-1]) != given - 1:
            raise ValueError(
                "AR takes a prefix only: given tokens must stand at positions 0, 1, 2, ...; to fill gaps use EsoLM"
            )
        rank = np.arange(request.length)
        start = np.arange(given, request.length)
        return Plan(
            order=rank,
            token_stage=rank,
            mask_stage=rank,
            masks_public=True,
            shifted=True,
            closed=start + 1,
            start=start,
            stop=start + 1,
            shown=start + 1,
            sequential=np.ones(len(start), dtype=bool),
        )


def _view(batch: Batch, mask_id: int) -> View:
    tokens = batch.tokens
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    stage, public = padded(positions, torch.ones_like(batch.valid), batch.valid)
    return View(
        term="sequential",
        tokens=torch.cat((torch.full_like(tokens[:, :1], mask_id), tokens[:, :-1]), dim=1),
        positions=positions,
        stage=stage,
        public=public,
        targets=tokens,
        weights=batch.scored.float(),
        num_tokens=int(batch.scored.sum()),
    )
