"""Masked diffusion (MDLM, arXiv:2406.07524): masked tokens from all clean ones, every row reading every row.

    E_t sum_{l masked} -(alpha'_t / (1 - alpha_t)) log p(x_l | z_t),   alpha_t = 1 - (1 - 1e-3) t

Nothing can be cached: each newly written token is read by all rows. A bound, never exact.

    z = a m c m      every row private and of stage 0
    # # # #
    # # # #
    # # # #
    # # # #
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from esolm.algorithms.algorithm import Algorithm, Batch, Plan, Request, View, clean_tokens, padded, refuse
from esolm.noise import Noise
from esolm.schedule import LogLinear, spread_times, stratified_times
from esolm.types import TextFlags

_TIMES, _MASKS = 0, 1  # purposes of the noise


@dataclass(frozen=True, kw_only=True)
class MDLM(Algorithm):
    """Masked diffusion. `low_variance` drops the weight from the training loss, never from the bound."""

    low_variance: bool = False

    @property
    def bound_is_exact(self) -> bool:
        return False

    @property
    def one_pass(self) -> bool:
        return False

    @property
    def length_multiple(self) -> int:
        return 1

    def views(self, batch: Batch, noise: Noise, mask_id: int) -> tuple[View, ...]:
        t = stratified_times(noise.uniform(_TIMES, 1), _rows(noise), noise.total)
        return (self._view(batch, t, noise, mask_id, weighted=not self.low_variance),)

    def bound(self, batch: Batch, noise: Noise, mask_id: int) -> tuple[View, ...]:
        return (self._view(batch, spread_times(noise.shared(_TIMES), _rows(noise)), noise, mask_id, weighted=True),)

    def _view(self, batch: Batch, t: Float64[Tensor, "batch 1"], noise: Noise, mask_id: int, *, weighted: bool) -> View:
        clean = clean_tokens(batch, LogLinear().alpha(t), noise.uniform(_MASKS, batch.tokens.shape[1]))
        return self.view_of(batch, clean, t, mask_id, weighted=weighted)

    def view_of(
        self,
        batch: Batch,
        clean: TextFlags,
        t: Float64[Tensor, "batch 1"],
        mask_id: int,
        *,
        weighted: bool = True,
    ) -> View:
        """The view for tokens already masked, at times `t`."""
        weights = LogLinear().weight(t) if weighted else torch.ones_like(t)
        stage, public = padded(torch.zeros_like(batch.tokens), torch.zeros_like(batch.valid), batch.valid)
        return View(
            term="diffusion",
            tokens=batch.tokens.where(clean, mask_id),
            positions=torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens),
            stage=stage,
            public=public,
            targets=batch.tokens,
            weights=(weights * ~clean).float(),
            num_tokens=int(batch.scored.sum()),
            times=t,
        )

    def plan(self, request: Request, rng: np.random.Generator) -> Plan:
        refuse(self, request, alpha_0="it is 1 for it")
        written, counts = request.positions.chosen(request.free, 1.0, request.num_steps, rng, every=True)
        given, length = len(request.given), request.length
        stop = given + np.cumsum(counts)
        zeros = np.zeros(length, dtype=np.int64)
        return Plan(
            order=np.concatenate((request.fixed, written)),
            token_stage=zeros,
            mask_stage=zeros,
            masks_public=False,
            shifted=False,
            closed=np.zeros(len(stop), dtype=np.int64),
            start=stop - counts,
            stop=stop,
            shown=np.full(len(stop), length),
            sequential=np.zeros(len(stop), dtype=bool),
        )


def _rows(noise: Noise) -> Float64[Tensor, "batch 1"]:
    return torch.arange(noise.start, noise.stop, dtype=torch.float64)[:, None]
