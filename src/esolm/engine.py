"""The denoiser as it writes a few rows at a time, all of a step in one call of compiled C (native).

At a few rows a step takes as long as its weights take to be read, if nothing else waits: so all of its operations are
one list, over weights that lie in the order in which they are read, and its threads stay at work from the first to the
last. The function is that of `inference.Inference`; it needs a C compiler, and many rows go faster through torch.
"""

import ctypes
import threading
from collections.abc import Sequence
from ctypes import c_void_p
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from esolm import native
from esolm.attention import Relation
from esolm.cache import Cache
from esolm.denoiser import Block, Denoiser
from esolm.draw import NOTHING_TO_DRAW
from esolm.native import Op, Pass
from esolm.products import Chosen, fits_half, int8_steps, table_dtype

_HIDDEN, _NORMED, _QKV, _MIXED, _UP, _GATED, _OUT = range(7)  # buffers: [row, width of what they hold]
_FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # the defaults of torch are the user's
_LINE = 64  # bytes that memory gives at once
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


class Engine:
    """A denoiser's forward pass over a few rows on a CPU."""

    def __init__(self, denoiser: Denoiser, dtype: Chosen) -> None:
        library = native.library()
        assert library is not None, "there is no compiler: ask `native.library` first"
        self._library, self.config, self.dtype = library, denoiser.config, dtype
        self.device = torch.device("cpu")
        self._kept_dtype = torch.float32 if dtype == "float32" else torch.float16  # of keys and values
        self._lock = threading.Lock()  # of the buffers and the record below, which are used again and again
        self._kept: list[Tensor] = []  # what the operations point to
        self.products: list[Panels] = []
        self._memory = _Memory(denoiser, library)
        ops = self._body(denoiser)
        self._body_ops = (Op * len(ops))(*ops)
        head = self._product(denoiser.head, _NORMED, _OUT)
        draw = [Op(kind=kind, outputs=head.outputs, source=_OUT) for kind in (native.SUM, native.FIND)]
        self._head_ops, self._draw_ops = (Op * 1)(head), (Op * 3)(head, *draw)
        self._buffers: list[Tensor] = []
        self._pass = Pass(
            heads=self.config.heads,
            kv_heads=self.config.num_kv_heads,
            dim=self.config.dim,
            epsilon=self.config.norm_epsilon,
        )
        self._rows = 0

    @torch.inference_mode()
    def __call__(
        self,
        tokens: Int64[Tensor, "batch row"],
        positions: Int64[Tensor, "batch row"],
        who: Relation,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch row width"]:
        """As `Denoiser.forward`. IndexError for an id or a position that the network does not have, TypeError for what
        is not int64."""
        batch, rows = tokens.shape
        tokens, positions = tokens.contiguous(), positions.expand(batch, -1).contiguous()
        _check(tokens, self.config.vocab_size, "id")
        _check(positions, self.config.length, "position")
        at, starts = _places(batch, rows) if who.counts is None else _ragged(rows, who.counts)
        kept, lanes = cache or self._passing(batch, rows), self._library.lanes
        if kept.keys[0].dtype != self._kept_dtype or kept.keys[0].shape[2] % lanes or kept.keys[0].shape[3] % lanes:
            raise ValueError("this cache was made for another network: make it by this one's `cache`")
        keys, values, threads = _addresses(kept.keys), _addresses(kept.values), torch.get_num_threads()
        scores = torch.empty(threads * native.QUERIES * -(-kept.used // lanes) * lanes, **_FLOATS)
        slots = np.ascontiguousarray(kept.lengths, dtype=np.int64)
        mask = who.mask if who.mask is None or who.mask.stride(-1) == 1 else who.mask.contiguous()
        out = torch.empty(batch, rows, self.config.width, **_FLOATS)
        with self._lock:
            buffers = self._room(len(at))
            buffers[_OUT] = out.data_ptr()
            work = self._pass
            work.batch, work.rows, work.count = batch, rows, len(at)
            work.capacity, work.used = kept.capacity, kept.used
            work.at, work.starts, work.slots = at.ctypes.data, starts.ctypes.data, slots.ctypes.data
            work.tokens, work.positions = tokens.data_ptr(), positions.data_ptr()
            work.keys, work.values = ctypes.addressof(keys), ctypes.addressof(values)
            work.buffers, work.scores = ctypes.addressof(buffers), scores.data_ptr()
            work.reads = native.CAUSAL if who.causal else native.EVERYTHING
            if mask is not None:
                work.reads, work.mask = native.MASKED, mask.data_ptr()
                work.mask_text, work.mask_row = mask.stride(0), mask.stride(2)
            self._run(self._body_ops, threads)
        return out

    @torch.inference_mode()
    def logits(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocab"]:
        """As `Denoiser.logits`."""
        out = torch.empty(*hidden.shape[:-1], self.config.vocab_size, **_FLOATS)
        with self._lock:
            self._head(hidden, out, self._head_ops)
        return out

    @torch.inference_mode()
    def draw(self, hidden: Float[Tensor, "row width"], uniform: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """A token for each row, drawn as `draw.draw` draws it, the mask left out; `uniform` is float64, `[row]`.

        ValueError if a row has NaN or no id left to draw.
        """
        rows, vocab = len(hidden), self.config.vocab_size
        sums = np.empty((rows, -(-(vocab - 1) // native.BLOCK), 2))
        uniform, drawn = np.ascontiguousarray(uniform), np.empty(rows, dtype=np.int64)
        with self._lock:
            work = self._pass
            work.temperature, work.uniform = temperature, uniform.ctypes.data
            work.sums, work.drawn = sums.ctypes.data, drawn.ctypes.data
            self._head(hidden, torch.empty(rows, vocab, **_FLOATS), self._draw_ops)
        if drawn.min(initial=0) < 0:
            raise ValueError(NOTHING_TO_DRAW)
        return drawn

    def cache(self, batch: int, capacity: int) -> Cache:
        """As `Denoiser.cache`, in whole vectors."""
        config, lanes = self.config, self._library.lanes
        return Cache(
            layers=config.layers,
            batch=batch,
            kv_heads=config.num_kv_heads,
            capacity=-(-capacity // lanes) * lanes,
            dim=-(-config.dim // lanes) * lanes,
            dtype=self._kept_dtype,
            device=self.device,
        )

    def _passing(self, batch: int, rows: int) -> Cache:
        """A cache for one pass that keeps nothing."""
        made = self.cache(batch, rows)
        made.place(rows)
        return made

    def _head(self, hidden: Tensor, out: Tensor, ops: "ctypes.Array[Op]") -> None:
        """Run operations that begin with the head."""
        rows = hidden.float().contiguous()
        buffers = (c_void_p * (_OUT + 1))()
        buffers[_NORMED], buffers[_OUT] = rows.data_ptr(), out.data_ptr()
        self._pass.count = rows.numel() // self.config.width
        self._pass.buffers = ctypes.addressof(buffers)
        self._run(ops, torch.get_num_threads())

    def _run(self, ops: "ctypes.Array[Op]", threads: int) -> None:
        if self._library.run(ops, len(ops), self._pass, threads):
            raise RuntimeError(f"a network of {len(ops)} operations is more than native/step.c takes")

    def _room(self, rows: int) -> "ctypes.Array[c_void_p]":
        """Addresses of buffers for this many rows; they stay until more are needed."""
        if rows > self._rows:
            config = self.config
            inner, mlp = config.heads * config.dim, config.hidden_mlp
            sizes = {_HIDDEN: config.width, _QKV: inner + 2 * config.num_kv_heads * config.dim, _MIXED: inner}
            sizes |= {_NORMED: config.width, _UP: 2 * mlp if config.gated else mlp, _GATED: mlp if config.gated else 0}
            self._buffers = [torch.empty(rows, sizes.get(number, 0), **_FLOATS) for number in range(_OUT + 1)]
            self._rows = rows
        return (c_void_p * (_OUT + 1))(*(buffer.data_ptr() for buffer in self._buffers))

    def _body(self, denoiser: Denoiser) -> list[Op]:
        """The operations from tokens to hidden states."""
        config = self.config
        table = table_dtype(self.dtype)
        angles = self._keep(torch.stack((denoiser.cos, denoiser.sin), dim=1).float())
        embedding = self._keep(denoiser.embed.weight.detach().to(table))
        kind, kept = (native.DTYPES[str(which).removeprefix("torch.")] for which in (table, self._kept_dtype))
        ops = [Op(kind=native.EMBED, dtype=kind, outputs=config.width, target=_HIDDEN, weight=embedding.data_ptr())]
        for layer, block in enumerate(denoiser.blocks):
            assert isinstance(block, Block)
            norms = [self._keep(norm.weight.float()) for norm in (block.q_norm, block.k_norm)] if config.qk_norm else []
            q_norm, k_norm = (norm.data_ptr() for norm in norms) if norms else (None, None)
            turn = Op(
                kind=native.ROTATE,
                dtype=kept,
                layer=layer,
                source=_QKV,
                weight=angles.data_ptr(),
                scale=q_norm,
                bias=k_norm,
            )
            flags = 0 if config.gated else native.GELU
            ops += [
                self._norm(block.norm1),
                self._product(block.qkv, _NORMED, _QKV),
                turn,
                Op(kind=native.ATTEND, dtype=kept, layer=layer, source=_QKV, target=_MIXED),
                self._product(block.out, _MIXED, _HIDDEN, native.ADD),
                self._norm(block.norm2),
                self._product(block.up, _NORMED, _UP, flags),
            ]
            if config.gated:
                ops.append(Op(kind=native.GATE, outputs=config.hidden_mlp, source=_UP, target=_GATED))
            ops.append(self._product(block.down, _GATED if config.gated else _UP, _HIDDEN, native.ADD))
        return [*ops, self._norm(denoiser.norm, _OUT, native.SPREAD)]

    def _norm(self, norm: nn.LayerNorm | nn.RMSNorm, target: int = _NORMED, flags: int = 0) -> Op:
        bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
        return Op(
            kind=native.NORM,
            flags=flags | (native.RMS if isinstance(norm, nn.RMSNorm) else 0),
            outputs=self.config.width,
            source=_HIDDEN,
            target=target,
            weight=self._keep(norm.weight.float()).data_ptr(),
            bias=None if bias is None else self._keep(bias.float()).data_ptr(),
        )

    def _product(self, linear: nn.Linear, source: int, target: int, flags: int = 0) -> Op:
        panels = Panels(linear, self.dtype, self._memory, pairs=self._library.pairs)
        self.products.append(panels)
        return Op(
            kind=native.PRODUCT,
            dtype=native.DTYPES["pairs" if panels.pairs else panels.dtype],
            flags=flags,
            inputs=panels.inputs,
            outputs=panels.outputs,
            source=source,
            target=target,
            weight=panels.weight.data_ptr(),
            scale=None if panels.scale is None else panels.scale.data_ptr(),
            bias=None if panels.bias is None else panels.bias.data_ptr(),
        )

    def _keep(self, tensor: Tensor) -> Tensor:
        """A copy that nobody changes, for as long as this lives."""
        own = tensor.detach().clone().contiguous()
        self._kept.append(own)
        return own


class _Memory:
    """One piece for the weights of all products, in large pages: they lie in the order in which they are read. It is
    asked for before it is written, since pages that are in use already stay small; what is never written is not taken.
    """

    def __init__(self, denoiser: Denoiser, library: native.Library) -> None:
        linears = [part for part in denoiser.modules() if isinstance(part, nn.Linear)]
        numbers = sum((part.out_features + native.PANEL) * (part.in_features + 1) for part in linears)
        self._bytes = torch.empty(4 * numbers + _LINE * len(linears), dtype=torch.uint8, device="cpu")
        self._used = -self._bytes.data_ptr() % _LINE
        library.advise(self._bytes.data_ptr(), self._bytes.nbytes)

    def copy(self, weight: Tensor) -> Tensor:
        """A contiguous copy of it, behind the last one."""
        own = self._bytes[self._used : self._used + weight.nbytes].view(weight.dtype).view(weight.shape)
        self._used += -(-weight.nbytes // _LINE) * _LINE
        return own.copy_(weight)


class Panels:
    """A linear layer's weight as the products of `native` read it: `[panel, input, output]`; of bfloat16 where the CPU
    multiplies two by two `[panel, input / 2, output, 2]`, and rows are rounded as well."""

    def __init__(self, linear: nn.Linear, dtype: Chosen, memory: _Memory, *, pairs: bool) -> None:
        weight = linear.weight.detach().float()
        self.outputs, self.inputs = weight.shape
        if dtype == "float16" and not fits_half(weight):
            dtype = "float32"
        self.dtype, self.pairs = dtype, pairs and dtype == "bfloat16"
        self.scale: Tensor | None = None
        if dtype == "int8":
            weight, scale = int8_steps(weight)
            self.scale = scale.float()
        weight = weight.to(_DTYPES[dtype])
        panels = -(-self.outputs // native.PANEL)
        together = 2 if self.pairs else 1
        deep = -(-self.inputs // together)
        padded = weight.new_zeros(panels * native.PANEL, deep * together)
        padded[: self.outputs, : self.inputs] = weight
        self.weight = memory.copy(padded.view(panels, native.PANEL, deep, together).transpose(1, 2))
        self.bias = None if linear.bias is None else linear.bias.detach().float().clone()

    @property
    def kind(self) -> str:
        return f"native {self.dtype}"

    @property
    def nbytes(self) -> int:
        """Bytes of weights read for a product."""
        return self.weight.itemsize * self.inputs * self.outputs


def _check(numbers: Tensor, limit: int, what: str) -> None:
    """IndexError unless all of them lie in [0, limit): what is outside would be read from other memory. TypeError for
    numbers of another dtype, which would be read as int64 all the same."""
    if numbers.dtype != torch.int64:
        raise TypeError(f"{what}s must be int64, got {numbers.dtype}")
    found = numbers.numpy()
    if found.size and not 0 <= found.min() <= found.max() < limit:
        raise IndexError(f"{what}s must lie in [0, {limit}), got {found.min()} to {found.max()}")


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


@lru_cache(maxsize=64)
def _places(batch: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The place of each row among `batch * rows`, and each text's first row: all rows there are."""
    return np.arange(batch * rows), np.arange(batch + 1) * rows


def _ragged(rows: int, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same where a text has only its first `counts` rows."""
    at = np.flatnonzero(np.arange(rows) < counts[:, None])
    return at, np.concatenate(([0], counts.cumsum()))
