"""The denoiser as it only writes: the same function of the same weights, with no more work a row than that takes.

At a few rows half of a step would go to Python and to small kernels, not to the weights. So on a CPU the network is
plain objects in a list, its products are laid out beforehand (products.py), and the residual stream, norms, attention
and its cache stay in float32, which is as fast there for a few rows. On other devices it is the denoiser itself, in
bf16 where that is faster. It learns nothing, and does not follow the denoiser that it was made from.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from esolm import native
from esolm.attention import Relation
from esolm.cache import Cache
from esolm.calibrate import capability
from esolm.denoiser import Block, Config, Denoiser, rotate
from esolm.engine import Engine
from esolm.products import MANY_ROWS, Chosen, Dtype, Product, chosen, packed, table_dtype

_Norm = tuple[Tensor, Tensor | None]  # weight and bias


def prepared(denoiser: Denoiser, dtype: Dtype = "auto", *, rows: int = 2) -> "Network":
    """The network for writing, with its products of this dtype.

    `rows` go through it at once: 2 a text in most plans, all of a text's for MDLM. ValueError for a dtype that the
    device has no product of.
    """
    device = denoiser.embed.weight.device
    few = device.type == "cpu" and rows < MANY_ROWS
    engine = few and compiled()
    dtype = chosen(dtype, device, rows, engine=engine)
    if device.type == "cpu":
        return Engine(denoiser, dtype) if engine else Inference(denoiser, dtype, lacking=_lacking() if few else "")
    network = copy.deepcopy(denoiser).eval().requires_grad_(False)
    return network.to(torch.bfloat16) if dtype == "bfloat16" else network


@cache
def compiled() -> bool:
    """Is there a compiled engine, and does it give a small network's numbers? What a compiler made is not assumed."""
    if native.library() is None:
        return False
    with torch.device("cpu"):
        network = Denoiser(Config(vocab_size=40, length=8, width=32, layers=2, heads=2, kv_heads=1, qk_norm=True))
        rows = torch.tensor([[1, 2, 39], [3, 39, 39]]), torch.tensor([[0, 1, 2], [4, 2, 3]]), Relation(causal=True)
    network.float()  # whatever torch's default is
    checks: tuple[tuple[Chosen, float], ...] = (("float32", 1e-5), ("bfloat16", 1e-2))  # each has kernels of its own
    with torch.inference_mode():
        expected = network.logits(network(*rows))
        made = [(Engine(network, dtype), off) for dtype, off in checks]
        return all(torch.allclose(expected, engine.logits(engine(*rows)), atol=off) for engine, off in made)


def _lacking() -> str:
    """Why there is no compiled engine."""
    return native.found().why or "what the compiler made gives other numbers than torch"


class Inference:
    """A denoiser's forward pass on a CPU. `lacking`: why it is this one, where an engine would be faster."""

    def __init__(self, denoiser: Denoiser, dtype: Chosen, *, lacking: str = "") -> None:
        self.config, self.dtype, self.lacking = denoiser.config, dtype, lacking
        self.device = torch.device("cpu")
        self._embedding = denoiser.embed.weight.detach().to(table_dtype(dtype), copy=True)
        self._angles = torch.stack((denoiser.cos, denoiser.sin), dim=1)
        self._layers = [_Layer.of(block, dtype) for block in denoiser.blocks if isinstance(block, Block)]
        self._reads, self._never = torch.tensor([0.0, -torch.inf], dtype=torch.float32, device="cpu").unbind()
        self._last = _norm_of(denoiser.norm)
        self._head = packed(denoiser.head, dtype)

    @property
    def products(self) -> list[Product]:
        """Its products in the order in which they run, the head last."""
        inner = [part for layer in self._layers for part in (layer.qkv, layer.out, layer.up, layer.down)]
        return [*inner, self._head]

    def __call__(
        self,
        tokens: Int64[Tensor, "batch row"],
        positions: Int64[Tensor, "batch row"],
        who: Relation,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch row width"]:
        """As `Denoiser.forward`."""
        h = F.embedding(tokens, self._embedding).float()
        cos, sin = self._angles[positions][:, :, None].unbind(3)
        bias = None if who.mask is None else torch.where(who.mask, self._reads, self._never)  # as each layer wants it
        for number, layer in enumerate(self._layers):
            q, k, v = self._heads(layer, layer.qkv(self._normed(h, layer.norm1)), cos, sin)
            if cache is not None:
                k, v = cache.update(number, k, v)
            h = h + layer.out(_attention(q, k, v, bias, who.causal).transpose(1, 2).flatten(2))
            up = layer.up(self._normed(h, layer.norm2))
            if self.config.gated:
                gate, up = up.chunk(2, dim=-1)
                h = h + layer.down(F.silu(gate).mul_(up))
            else:
                h = h + layer.down(F.gelu(up, approximate="tanh"))
        return self._normed(h, self._last)

    def logits(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocab"]:
        """As `Denoiser.logits`."""
        return self._head(hidden)

    def cache(self, batch: int, capacity: int) -> Cache:
        """As `Denoiser.cache`."""
        return self.config.cache(batch, capacity, torch.float32, self.device)

    def _heads(self, layer: "_Layer", qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[batch, head, row, dim]`, turned to their places."""
        config = self.config
        heads, kv_heads = config.heads, config.num_kv_heads
        qk, v = qkv.view(*qkv.shape[:2], -1, config.dim).split_with_sizes((heads + kv_heads, kv_heads), 2)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk.split_with_sizes((heads, kv_heads), 2)
            qk = torch.cat((_rms_normed(q, layer.q_norm, config), _rms_normed(k, layer.k_norm, config)), dim=2)
        q, k = rotate(qk, cos, sin).transpose(1, 2).split_with_sizes((heads, kv_heads), 1)
        return q, k, v.transpose(1, 2)

    def _normed(self, x: Tensor, norm: _Norm) -> Tensor:
        weight, bias = norm
        if self.config.rms_norm:
            return _rms_normed(x, weight, self.config)
        return torch.layer_norm(x, weight.shape, weight, bias, self.config.norm_epsilon)


Network = Denoiser | Inference | Engine


def describe(network: Network) -> str:
    """The kinds of its products, what they read for a step, and what the CPU can do."""
    if isinstance(network, Denoiser):
        return f"{network.cos.dtype}".removeprefix("torch.") + f" on {network.cos.device}"
    kinds = Counter(product.kind for product in network.products)
    told = " and ".join(f"{number} {kind}" for kind, number in kinds.items())
    megabytes = sum(product.nbytes for product in network.products) / 1e6
    return f"{told}, {megabytes:.1f} MB ({capability()}, {torch.get_num_threads()} threads)"


@dataclass(frozen=True, slots=True)
class _Layer:
    """The parts of a block."""

    norm1: _Norm
    qkv: Product
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Product
    norm2: _Norm
    up: Product
    down: Product

    @staticmethod
    def of(block: Block, dtype: Chosen) -> "_Layer":
        has = block.config.qk_norm
        return _Layer(
            norm1=_norm_of(block.norm1),
            qkv=packed(block.qkv, dtype),
            q_norm=_norm_of(block.q_norm)[0] if has else None,
            k_norm=_norm_of(block.k_norm)[0] if has else None,
            out=packed(block.out, dtype),
            norm2=_norm_of(block.norm2),
            up=packed(block.up, dtype),
            down=packed(block.down, dtype),
        )


def _norm_of(norm: nn.LayerNorm | nn.RMSNorm) -> _Norm:
    bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
    return norm.weight.detach().clone().float(), None if bias is None else bias.detach().clone().float()


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, enable_gqa=grouped)


def _rms_normed(x: Tensor, weight: Tensor, config: Config) -> Tensor:
    return torch.rms_norm(x, weight.shape, weight, config.norm_epsilon)
