"""Randomness as a pure function of its key: a counter-based generator (Philox) keyed by named integers.

Nothing here has state: the numbers of row `i` of step `s` are the same whichever process asks for them, in whatever
batch, and before or after a restart. It knows no distribution but the uniform one.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

_WORDS_PER_COUNT = 4  # Philox4x64 makes four 64-bit words for one value of its counter
_ROOM = 2**40  # values of the counter for a row `by_position`: for longer texts than there are


def generator(*key: int) -> np.random.Generator:
    """A fresh numpy generator that is a function of `key` alone. Key parts are integers in [0, 2^63)."""
    return np.random.Generator(_philox(key))


def uniforms(count: int, *key: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1), a function of `key` alone: number `i` does not depend on `count`."""
    return generator(*key).random(count)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The random numbers of rows `start` to `stop` of a global batch of `total` rows, at one step of one run.

    `by_position`, as scores are drawn: the numbers of a row do not depend on how many are asked for, so that padding
    changes none. Else rows are packed, as training draws them.
    """

    seed: int
    step: int
    start: int
    stop: int
    total: int
    by_position: bool = False

    def uniform(self, purpose: int, columns: int) -> Float64[Tensor, "batch columns"]:
        """Uniforms in [0, 1) for these rows: a slice of what the whole global batch would get for this purpose."""
        counts = -(-columns // _WORDS_PER_COUNT)
        philox, rows = _philox((self.seed, self.step, purpose)), self.stop - self.start
        if self.by_position:
            philox.advance(self.start * _ROOM)
            numbers = np.empty((rows, counts * _WORDS_PER_COUNT))
            for row in numbers:
                np.random.Generator(philox).random(out=row)
                philox.advance(_ROOM - counts)
        else:
            philox.advance(self.start * counts)
            numbers = np.random.Generator(philox).random((rows, counts * _WORDS_PER_COUNT))
        return torch.from_numpy(np.ascontiguousarray(numbers[:, :columns]))

    def shared(self, purpose: int) -> float:
        """One uniform for all rows of the global batch. Its purpose must be no other's."""
        return float(uniforms(1, self.seed, self.step, purpose)[0])


def _philox(key: tuple[int, ...]) -> np.random.Philox:
    for part in key:
        if not 0 <= part < 2**63:
            raise ValueError(f"a seed must lie in [0, 2^63), got {part}: choose a non-negative one")
    words = [len(key)] + [word for part in key for word in (part & 0xFFFFFFFF, part >> 32)]
    return np.random.Philox(np.random.SeedSequence(words))
