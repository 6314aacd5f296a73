"""The denoiser as it writes a few rows at a time, all of a step in one call of compiled C (native).

At a few rows a step takes as long as its weights take to be read, if nothing else waits: so all of its operations are
one list, over weights that lie in the order in which they are read, and its threads stay at work from the first to the
last. The function is that of `inference.Inference`; it needs a C compiler, and many rows go faster through torch.
"""

import ctypes
import threading
from ctypes import c_void_p

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from esolm import native
from esolm.attention import Relation
from esolm.cache import Cache
from esolm.denoiser import Block, Denoiser
from esolm.draw import NOTHING_TO_DRAW
from esolm.native import Op, Pass
from esolm.panels import Memory, Panels
from esolm.passes import FLOATS, GATED, HIDDEN, MIXED, NORMED, OUT, QKV, UP, WANTED, Passes, run
from esolm.products import Chosen, table_dtype


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
        self._memory = Memory(denoiser, library)
        ops = self._body(denoiser)
        self._body_ops = (Op * len(ops))(*ops)
        head = self._product(denoiser.head, NORMED, OUT)
        draw = [Op(kind=kind, outputs=head.outputs, source=OUT) for kind in (native.SUM, native.FIND)]
        self._head_ops, self._draw_ops = (Op * 1)(head), (Op * 3)(head, *draw)
        self._buffers = (c_void_p * (OUT + 1))()
        self._pass = Pass(buffers=ctypes.addressof(self._buffers))  # of the head and the draw
        self._room(1)

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
        kept, real = cache or self._passing(batch, rows), np.ones((1, batch, rows), dtype=bool)
        passes = self.passes(
            kept,
            positions=positions.expand(batch, -1).numpy()[None],
            real=real,
            wanted=real,
            mask=np.broadcast_to(_mask(who, rows, kept.used), (1, batch, rows, kept.used)),
            kept=kept.lengths[None],
        )
        return passes.hidden(0, tokens.numpy()).view(batch, rows, -1)

    def passes(self, cache: Cache, **rows: np.ndarray) -> Passes:
        """Passes over rows that are known beforehand: see there. ValueError for a cache that is not this network's."""
        _, _, capacity, dim = cache.keys[0].shape
        whole = self._library.whole
        if cache.keys[0].dtype != self._kept_dtype or (whole(capacity), whole(dim)) != (capacity, dim):
            raise ValueError("this cache was made for another network: make it by this one's `cache`")
        return Passes(self._library, self.config, self._body_ops, cache, **rows)

    def logits(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocab"]:
        """As `Denoiser.logits`."""
        out = torch.empty(*hidden.shape[:-1], self.config.vocab_size, **FLOATS)
        with self._lock:
            self._head(hidden.reshape(-1, self.config.width), out, self._head_ops)
        return out

    def draw(self, hidden: Float[Tensor, "row width"], uniform: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """A token for each row, drawn as `draw.draw` draws it, the mask left out; `uniform` is float64, `[row]`.

        ValueError if a row has NaN or no id left to draw.
        """
        rows = len(hidden)
        with self._lock:
            if rows > len(self._logits):
                self._room(rows)
            self._uniform[:rows] = uniform
            self._pass.temperature = temperature
            self._head(hidden, self._logits, self._draw_ops)
            drawn = self._drawn[:rows].copy()
        if drawn.min(initial=0) < 0:
            raise ValueError(NOTHING_TO_DRAW)
        return drawn

    def cache(self, batch: int, capacity: int) -> Cache:
        """As `Denoiser.cache`, in whole vectors."""
        config, whole = self.config, self._library.whole
        return Cache(
            layers=config.layers,
            batch=batch,
            kv_heads=config.num_kv_heads,
            capacity=whole(capacity),
            dim=whole(config.dim),
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
        hidden = hidden.float().contiguous()
        self._buffers[NORMED], self._buffers[OUT] = hidden.data_ptr(), out.data_ptr()
        self._pass.count = len(hidden)
        run(self._library, ops, ctypes.addressof(self._pass), torch.get_num_threads())

    def _room(self, rows: int) -> None:
        """Room to draw so many rows; it stays until more are needed."""
        vocab = self.config.vocab_size
        self._logits, self._uniform = torch.empty(rows, vocab, **FLOATS), np.empty(rows)
        self._sums, self._drawn = np.empty((rows, -(-vocab // native.BLOCK), 2)), np.empty(rows, dtype=np.int64)
        for name, array in (("uniform", self._uniform), ("sums", self._sums), ("drawn", self._drawn)):
            setattr(self._pass, name, array.ctypes.data)

    def _body(self, denoiser: Denoiser) -> list[Op]:
        """The operations from tokens to hidden states."""
        config = self.config
        table = table_dtype(self.dtype)
        angles = self._keep(torch.stack((denoiser.cos, denoiser.sin), dim=1).float())
        embedding = self._keep(denoiser.embed.weight.detach().to(table))
        kind, kept = (native.DTYPES[str(which).removeprefix("torch.")] for which in (table, self._kept_dtype))
        ops = [
            Op(
                kind=native.EMBED,
                dtype=kind,
                inputs=config.vocab_size,
                outputs=config.width,
                target=HIDDEN,
                weight=embedding.data_ptr(),
            )
        ]
        for layer, block in enumerate(denoiser.blocks):
            assert isinstance(block, Block)
            norms = [self._keep(norm.weight.float()) for norm in (block.q_norm, block.k_norm)] if config.qk_norm else []
            q_norm, k_norm = (norm.data_ptr() for norm in norms) if norms else (None, None)
            turn = Op(
                kind=native.ROTATE,
                dtype=kept,
                layer=layer,
                inputs=config.length,
                source=QKV,
                weight=angles.data_ptr(),
                scale=q_norm,
                bias=k_norm,
            )
            qkv = self._product(block.qkv, NORMED, QKV)
            ops += [self._norm(block.norm1), qkv, turn]
            first = len(ops)
            if layer == config.layers - 1:
                sizes = ((HIDDEN, config.width), (QKV, qkv.outputs))
                ops += [Op(kind=native.TAKE, outputs=size, source=which, target=which) for which, size in sizes]
            ops += [
                Op(kind=native.ATTEND, dtype=kept, layer=layer, source=QKV, target=MIXED),
                self._product(block.out, MIXED, HIDDEN, native.ADD),
                self._norm(block.norm2),
                self._product(block.up, NORMED, UP, 0 if config.gated else native.GELU),
            ]
            if config.gated:
                ops.append(Op(kind=native.GATE, outputs=config.hidden_mlp, source=UP, target=GATED))
            ops.append(self._product(block.down, GATED if config.gated else UP, HIDDEN, native.ADD))
        ops.append(self._norm(denoiser.norm, OUT))
        for op in ops[first:]:
            op.which = WANTED
        return ops

    def _norm(self, norm: nn.LayerNorm | nn.RMSNorm, target: int = NORMED) -> Op:
        bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
        return Op(
            kind=native.NORM,
            flags=native.RMS if isinstance(norm, nn.RMSNorm) else 0,
            outputs=self.config.width,
            source=HIDDEN,
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


def _mask(who: Relation, rows: int, slots: int) -> Bool[np.ndarray, "_ row slot"]:
    """Who reads which slot, a mask for each text or one for all."""
    if who.mask is not None:
        return who.mask[:, 0].numpy()
    return np.tri(rows, slots, dtype=bool)[None] if who.causal else np.ones((1, rows, slots), dtype=bool)
