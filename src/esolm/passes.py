"""Passes of the compiled network over one cache, whose rows are known before their tokens are: what C is told of each
is laid out for all of them at once, so that a pass is a call and little else.

    all rows      embedding, every layer up to the last one's keys and values
    wanted rows   the rest of the last layer: what nobody asks for is not computed

It decides nothing about who reads what, and draws nothing.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_void_p
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from esolm import native
from esolm.cache import Cache
from esolm.denoiser import Config
from esolm.native import Library, Op, Pass

HIDDEN, NORMED, QKV, MIXED, UP, GATED, OUT = range(7)  # buffers: [row, width of what they hold]
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # the defaults of torch are the user's
ALL, WANTED = range(2)  # rows that an operation works on
_RECORD = np.dtype(Pass)


def run(library: Library, ops: "ctypes.Array[Op]", passes: int, threads: int) -> int:
    """Run operations on the passes at an address. 0, or native.OUTSIDE."""
    failed = library.run(ops, len(ops), passes, threads)
    if failed and failed != native.OUTSIDE:
        raise RuntimeError(f"a network of {len(ops)} operations is more than native/step.c takes")
    return failed


class Passes:
    """Passes over the same texts, one after the other. What a cache holds before a pass is known, its tokens are not.

    `real`: rows that there are, the others fill; `wanted`: those of them whose hidden states are asked for; `mask`:
    which slots of the cache a row reads; `kept`: slots that each text holds before a pass. ValueError if the cache is
    too small.
    """

    def __init__(
        self,
        library: Library,
        config: Config,
        ops: "ctypes.Array[Op]",
        cache: Cache,
        *,
        positions: Int64[np.ndarray, "pass text row"],
        real: Bool[np.ndarray, "pass text row"],
        wanted: Bool[np.ndarray, "pass text row"],
        mask: Bool[np.ndarray, "pass text row slot"],
        kept: Int64[np.ndarray, "pass text"],
    ) -> None:
        _check(positions, "positions")
        count, batch, rows = positions.shape
        used = (kept + real.sum(2)).max(1)
        if used.max() > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} rows, {used.max()} are needed: make it larger")
        assert used.max() <= mask.shape[3], "each slot in use needs its flag"
        self._library, self._config, self._ops = library, config, ops
        self._tokens = np.empty((batch, rows), dtype=np.int64)
        self._threads = torch.get_num_threads()
        scores = np.empty((self._threads, native.QUERIES, library.whole(int(used.max()))), dtype=np.float32)
        mask = mask if mask.strides[3] == 1 else np.ascontiguousarray(mask)
        positions, kept = np.ascontiguousarray(positions), np.ascontiguousarray(kept)
        self._held = [cache.keys, cache.values, positions, kept, mask, scores]  # what the records point to
        at, wants = _Listed(real), _Listed(wanted)
        self._wanted = wants.counts.tolist()
        records = np.zeros((count, 2), dtype=_RECORD)
        kv = {"keys": cache.keys, "values": cache.values}
        values = {"batch": batch, "rows": rows, "heads": config.heads, "kv_heads": config.num_kv_heads}
        values |= {"dim": config.dim, "capacity": cache.capacity, "epsilon": config.norm_epsilon}
        values |= {"mask_text": mask.strides[1], "mask_row": mask.strides[2]}
        values |= {name: ctypes.addressof(self._addresses(tensors)) for name, tensors in kv.items()}
        values |= {"tokens": _address(self._tokens), "scores": _address(scores)}
        for name, value in values.items():
            records[name] = value
        records["used"] = used[:, None]
        for name, array in (("positions", positions), ("slots", kept), ("mask", mask)):
            records[name] = _address(array) + array.strides[0] * np.arange(count)[:, None]
        for which, listed in enumerate((at, wants)):
            listed.tell(records[:, which])
        records["taken"][:, WANTED] = wants.among(at)
        self._buffers = [self._room(int(listed.counts.max())) for listed in (at, wants)]
        records["buffers"] = [ctypes.addressof(buffers) for buffers in self._buffers]
        self._held += [at, wants, records]
        self._first, self._apart = _address(records), records.strides[0]

    def hidden(self, number: int, tokens: Int64[np.ndarray, "text row"]) -> Float[Tensor, "wanted width"]:
        """Hidden states of the wanted rows of a pass. IndexError for an id or a position that the network does not
        have, TypeError for what is not int64."""
        _check(tokens, "ids")
        self._tokens[...] = tokens
        out = torch.empty(self._wanted[number], self._config.width, **FLOATS)
        self._buffers[WANTED][OUT] = out.data_ptr()
        if run(self._library, self._ops, self._first + number * self._apart, self._threads):
            limits = self._config.vocab_size, self._config.length
            raise IndexError("ids must lie in [0, {}) and positions in [0, {})".format(*limits))
        return out

    def _room(self, rows: int) -> "ctypes.Array[c_void_p]":
        """Addresses of buffers for this many rows."""
        config = self._config
        inner, mlp = config.heads * config.dim, config.hidden_mlp
        sizes = {HIDDEN: config.width, NORMED: config.width, QKV: inner + 2 * config.num_kv_heads * config.dim}
        sizes |= {MIXED: inner, UP: 2 * mlp if config.gated else mlp, GATED: mlp if config.gated else 0, OUT: 0}
        return self._addresses([torch.empty(rows, sizes[number], **FLOATS) for number in range(OUT + 1)])

    def _addresses(self, tensors: Sequence[Tensor]) -> "ctypes.Array[c_void_p]":
        made = (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
        self._held.append((tensors, made))
        return made


class _Listed:
    """The rows of each pass that have a flag, as C walks through them."""

    def __init__(self, flags: Bool[np.ndarray, "pass text row"]) -> None:
        self._flags = flags
        _, text, row = flags.nonzero()
        self._places = text * flags.shape[2] + row
        each = flags.sum(2)
        self.counts = each.sum(1)
        self._before = self.counts.cumsum() - self.counts  # rows of the passes before
        self._starts = np.zeros((len(each), each.shape[1] + 1), dtype=np.int64)
        each.cumsum(1, out=self._starts[:, 1:])
        self._taken = np.empty(0, dtype=np.int64)

    def tell(self, records: np.ndarray) -> None:
        """Write into records `[pass]` how many rows there are, the place of each, and each text's first."""
        records["count"] = self.counts
        records["at"] = _address(self._places) + self._before * self._places.itemsize
        records["starts"] = _address(self._starts) + self._starts.strides[0] * np.arange(len(self._starts))

    def among(self, other: "_Listed") -> np.ndarray:
        """Addresses, for each pass, of the numbers that these rows have among others of which they are some."""
        numbers = other._flags.reshape(len(self._flags), -1).cumsum(1) - 1
        self._taken = numbers.reshape(self._flags.shape)[self._flags]
        addresses: np.ndarray = _address(self._taken) + self._before * self._taken.itemsize
        return addresses


def _check(numbers: np.ndarray, what: str) -> None:
    """TypeError for numbers of another dtype than C reads."""
    if numbers.dtype != np.int64:
        raise TypeError(f"{what} must be int64, got {numbers.dtype}")


def _address(array: np.ndarray) -> int:
    return int(array.ctypes.data)
