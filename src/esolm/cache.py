"""Keys and values of public tokens, kept so that they are computed once: a preallocated value that is passed.

Rows of one pass are placed behind what each text already holds; `commit` keeps the first of them for good (the tokens),
the rest (the masks) are overwritten by the next pass. Texts of a batch may hold different numbers of tokens:

    slot      0 1 2 3 4 5 6 7
    text 0    t t t T M M .        t kept, T placed and about to be kept, M placed for this pass only, . free
    text 1    t t t t t T M        a free slot is PADDING: nobody reads it

It decides nothing about who is public; the sampler does.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from esolm.attention import PADDING, Relation, attends


class Cache:
    """Keys and values of `batch` texts in `layers` layers, with room for `capacity` rows each."""

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch, kv_heads, capacity, dim)
        # zeros, not empty: a free slot is masked, but NaN times zero would still be NaN
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.stage = torch.full((batch, capacity), PADDING, device=device)
        self.public = torch.zeros((batch, capacity), dtype=torch.bool, device=device)
        self.lengths = np.zeros(batch, dtype=np.int64)
        self._slots: Tensor | slice = slice(0, 0)
        self._used = 0

    @property
    def capacity(self) -> int:
        return self.stage.shape[1]

    def place(self, stage: Int64[Tensor, "batch row"], public: Bool[Tensor, "batch row"]) -> Relation:
        """Give the rows of the next pass their slots; returns who reads whom among them and what is kept."""
        rows = stage.shape[1]
        first, most = int(self.lengths.min()), int(self.lengths.max())
        self._used = most + rows
        if self._used > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} rows, {self._used} are needed: make it larger")
        if first == most:
            self._slots = slice(first, first + rows)
            self.stage[:, self._slots] = stage
            self.public[:, self._slots] = public
        else:
            self._scatter(stage, public)
        mask = attends(stage, public, self.stage[:, : self._used], self.public[:, : self._used])
        if not mask.is_cuda and bool(mask.all()):  # on CUDA it would cost a wait to find out
            return Relation()
        return Relation(mask=mask[:, None])

    def _scatter(self, stage: Tensor, public: Tensor) -> None:
        """Slots behind what each text holds; behind them, what an earlier and longer pass left is free."""
        lengths = torch.from_numpy(self.lengths).to(stage.device)[:, None]
        self._slots = lengths + torch.arange(stage.shape[1], device=stage.device)
        self.stage.scatter_(1, self._slots, stage)
        self.public.scatter_(1, self._slots, public)
        free = torch.arange(self._used, device=stage.device) >= lengths + stage.shape[1]
        self.stage[:, : self._used].masked_fill_(free, PADDING)
        self.public[:, : self._used].masked_fill_(free, False)

    def update(
        self,
        layer: int,
        k: Float[Tensor, "batch kv_head row dim"],
        v: Float[Tensor, "batch kv_head row dim"],
    ) -> tuple[Float[Tensor, "batch kv_head slot dim"], Float[Tensor, "batch kv_head slot dim"]]:
        """Write one layer's keys and values into the placed slots; returns those of all slots in use."""
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(self._slots, slice):
            keys[:, :, self._slots] = k
            values[:, :, self._slots] = v
        else:
            text = torch.arange(len(keys), device=keys.device)[:, None]
            keys[text, :, self._slots] = k.transpose(1, 2)
            values[text, :, self._slots] = v.transpose(1, 2)
        return keys.narrow(2, 0, self._used), values.narrow(2, 0, self._used)

    def commit(self, counts: np.ndarray) -> None:
        """Keep the first `counts[b]` of the rows placed for text `b`; the others are free again."""
        self.truncate(self.lengths + counts)

    def truncate(self, lengths: np.ndarray) -> None:
        """Keep the first `lengths[b]` slots of each text and free the rest (the next pass writes over them)."""
        self.lengths = lengths

    def select(self, texts: np.ndarray) -> None:
        """Keep only these texts of the batch, in this order."""
        index = torch.from_numpy(texts).to(self.stage.device)
        self.keys, self.values = [k[index] for k in self.keys], [v[index] for v in self.values]
        self.stage, self.public = self.stage[index], self.public[index]
        self.lengths = self.lengths[texts]
