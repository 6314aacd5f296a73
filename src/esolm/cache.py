"""Keys and values of public tokens, kept so that they are computed once: a preallocated value that is passed.

Rows of one pass are placed behind what each text already holds; `truncate` then keeps the first of them for good (the
tokens), and the next pass writes over the others (the masks). Texts of a batch may hold different numbers of tokens:

    slot      0 1 2 3 4 5 6 7
    text 0    t t t T M M . .      t kept, T placed and about to be kept, M placed for this pass only, . free
    text 1    t t t t t T M _      _ placed to fill the pass

It holds no stages and decides nothing about who reads what: the sampler does.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


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
        # zeros, not empty: nobody reads a free slot, but NaN times zero would still be NaN
        shape = (2, layers, batch, kv_heads, capacity, dim)
        self.keys: list[Tensor]  # of each layer
        self.values: list[Tensor]
        self.keys, self.values = (list(each.unbind()) for each in _zeros(shape, dtype, device))
        self.lengths = np.zeros(batch, dtype=np.int64)
        self._slots: Tensor | slice = slice(0, 0)
        self._used = 0

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    @property
    def used(self) -> int:
        """Slots in use: those kept and those placed for this pass."""
        return self._used

    def place(self, rows: int) -> None:
        """Give the next `rows` rows of every text the slots behind what it holds."""
        first, most = int(self.lengths.min()), int(self.lengths.max())
        self._used = most + rows
        if self._used > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} rows, {self._used} are needed: make it larger")
        if first == most:
            self._slots = slice(first, first + rows)
        else:
            device = self.keys[0].device
            self._slots = torch.from_numpy(self.lengths).to(device)[:, None] + torch.arange(rows, device=device)

    def update(
        self,
        layer: int,
        k: Float[Tensor, "batch kv_head row dim"],
        v: Float[Tensor, "batch kv_head row dim"],
    ) -> tuple[Float[Tensor, "batch kv_head slot dim"], Float[Tensor, "batch kv_head slot dim"]]:
        """Write one layer's keys and values into the placed slots; returns those of all slots in use."""
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(self._slots, slice):
            keys.narrow(2, self._slots.start, k.shape[2]).copy_(k)
            values.narrow(2, self._slots.start, v.shape[2]).copy_(v)
        else:
            text = torch.arange(len(keys), device=keys.device)[:, None]
            keys[text, :, self._slots] = k.transpose(1, 2)
            values[text, :, self._slots] = v.transpose(1, 2)
        return keys.narrow(2, 0, self._used), values.narrow(2, 0, self._used)

    def truncate(self, lengths: np.ndarray) -> None:
        """Keep the first `lengths[b]` rows of each text; the next pass writes over the others."""
        self.lengths = lengths

    def select(self, texts: np.ndarray) -> None:
        """Keep only these texts of the batch, in this order."""
        index = torch.from_numpy(texts).to(self.keys[0].device)
        self.keys, self.values = [k[index] for k in self.keys], [v[index] for v in self.values]
        self.lengths = self.lengths[texts]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU not by torch's threads, which would then keep a core from the engine's for a while."""
    memory = torch.empty(shape, dtype=dtype, device=device)
    if device.type != "cpu":
        return memory.zero_()
    memory.view(torch.uint8).numpy().fill(0)
    return memory
