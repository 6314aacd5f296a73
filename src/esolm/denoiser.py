"""The denoiser: a plain pre-norm transformer that knows no algorithm, only rows, their places and who reads whom.

    h = embed(token);   h += attention(norm(h));   h += mlp(norm(h));   logits = head(norm(h))

The configuration spans the authors' networks (layer norm, GELU, adaLN folded away on import) and Llama- or Qwen-like
decoders (RMS norm, gated MLP, grouped heads, query/key norm). It computes no loss and draws no tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esolm.attention import Relation, attention
from esolm.cache import Cache


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and kinds of the network. `vocab_size` counts the mask, which is the last id; `length` bounds positions."""

    vocab_size: int
    length: int
    width: int = 384
    layers: int = 6
    heads: int = 6
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: width / heads
    mlp_width: int | None = None  # None: 4 width
    gated: bool = False  # SiLU-gated MLP instead of GELU (tanh form)
    rms_norm: bool = False  # RMS norm instead of layer norm
    norm_bias: bool = False
    norm_epsilon: float = 1e-5
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = True
    head_bias: bool = True
    qk_norm: bool = False
    rotary_base: float = 10_000.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least {least}, got {value}"
            for name, least, value in (
                ("vocab_size", 2, self.vocab_size),
                ("length", 1, self.length),
                ("width", 1, self.width),
                ("layers", 1, self.layers),
                ("heads", 1, self.heads),
                ("kv_heads", 1, self.num_kv_heads),
                ("head_dim", 1, self.dim if self.heads > 0 else 1),
            )
            if value < least
        ]
        if self.heads > 0 and self.head_dim is None and self.width % self.heads:
            problems.append(f"width {self.width} must be divisible by heads {self.heads}, or give head_dim")
        if self.heads > 0 and self.dim % 2:
            problems.append(f"the size of a head must be even for rotary angles, got {self.dim}")
        if self.num_kv_heads > 0 and self.heads % self.num_kv_heads:
            problems.append(f"heads {self.heads} must be a multiple of kv_heads {self.num_kv_heads}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.rms_norm and self.norm_bias:
            problems.append("norm_bias needs layer norm: set rms_norm or norm_bias, not both")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def mask_id(self) -> int:
        return self.vocab_size - 1

    @property
    def dim(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden_mlp(self) -> int:
        return self.mlp_width or 4 * self.width

    def cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """An empty cache that fits a network of these sizes."""
        return Cache(
            layers=self.layers,
            batch=batch,
            kv_heads=self.num_kv_heads,
            capacity=capacity,
            dim=self.dim,
            dtype=dtype,
            device=device,
        )


class Denoiser(nn.Module):
    """The network. `forward` gives hidden states of rows; `logits` those of the rows that need them."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """Keep only what enters each block and compute its inside again in the backward pass: about a third more time,
        and a small part of the memory that grows with the batch. The gradients are the same bit for bit."""
        with torch.device("meta"):  # torch's own first values, from its global generator, are never drawn
            self.embed = nn.Embedding(config.vocab_size, config.width)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = _norm(config, config.width)
            self.head = nn.Linear(config.width, config.vocab_size, bias=config.head_bias)
        self.to_empty(device=torch.get_default_device())
        cos, sin = angles(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise(generator)

    def forward(
        self,
        tokens: Int64[Tensor, "batch row"],
        positions: Int64[Tensor, "batch row"],
        who: Relation,
        cache: Cache | None = None,
        *,
        wanted: Int64[Tensor, "target"] | None = None,
        noise: torch.Generator | None = None,
    ) -> Float[Tensor, "*rows width"]:
        """Hidden states (after the last norm) of rows that hold `tokens` at `positions` of the text.

        With a cache, rows also read what it keeps: the relation is to all its slots in use. Only the `wanted`
        rows (numbers of rows, texts laid end to end), if given: in the last layer the others give keys and values and
        no more. Dropout takes its random numbers from `noise`; without it nothing is dropped.
        """
        drop = _Dropout(self.config.dropout, noise)
        h = drop(self.embed(tokens).to(self.cos.dtype))
        angles = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
        for layer in range(len(self.blocks) - 1):
            h = self._through(layer, h, angles, who, cache, drop)
        if wanted is not None:
            flags = torch.zeros(tokens.numel(), dtype=torch.bool, device=tokens.device).index_fill_(0, wanted, True)
            who = who.reading(flags.view_as(tokens).any(0))
        h = self._through(len(self.blocks) - 1, h, angles, who, cache, drop, wanted)
        return _normed(h, self.norm)

    def _through(
        self,
        layer: int,
        h: Tensor,
        angles: tuple[Tensor, Tensor],
        who: Relation,
        cache: Cache | None,
        drop: "_Dropout",
        wanted: Tensor | None = None,
    ) -> Tensor:
        block, inputs = self.blocks[layer], (h, angles, who, cache, layer, drop, wanted)
        if not self.recompute or not torch.is_grad_enabled():
            out: Tensor = block(*inputs)
            return out
        return checkpoint(drop.repeatable(block), *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    def logits(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocab"]:
        """Raw logits, the mask's column included (a likelihood or a draw sets it to -inf)."""
        out: Tensor = self.head(hidden)
        return out

    def cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache that fits this network."""
        return self.config.cache(batch, capacity, self.cos.dtype, self.device)

    @property
    def device(self) -> torch.device:
        return self.cos.device

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        """Normal with deviation 0.02; what writes into the residual stream is smaller with depth; biases zero, norms
        one. Without a generator, that of seed 0: never torch's global one."""
        generator = generator or torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                deviation = 0.02 / (2 * self.config.layers) ** 0.5 if deep else 0.02
                parameter.normal_(0.0, deviation, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


class Block(nn.Module):
    """Attention and MLP, each on a normed copy of the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        inner, mlp = config.heads * config.dim, config.hidden_mlp
        self.norm1 = _norm(config, config.width)
        self.qkv = nn.Linear(config.width, inner + 2 * config.num_kv_heads * config.dim, bias=config.qkv_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.dim, config.norm_epsilon)
            self.k_norm = nn.RMSNorm(config.dim, config.norm_epsilon)
        self.out = nn.Linear(inner, config.width, bias=config.out_bias)
        self.norm2 = _norm(config, config.width)
        self.up = nn.Linear(config.width, 2 * mlp if config.gated else mlp, bias=config.mlp_bias)
        self.down = nn.Linear(mlp, config.width, bias=config.mlp_bias)

    def forward(
        self,
        h: Float[Tensor, "batch row width"],
        angles: tuple[Tensor, Tensor],
        who: Relation,
        cache: Cache | None,
        layer: int,
        drop: "_Dropout",
        wanted: Int64[Tensor, "target"] | None = None,
    ) -> Float[Tensor, "*rows width"]:
        mixed = self._attend(_normed(h, self.norm1), angles, who, cache, layer)
        if wanted is not None:
            h, mixed = (x.flatten(0, 1).index_select(0, wanted) for x in (h, mixed))
        h = h + drop(self.out(mixed))
        return h + drop(self._mlp(_normed(h, self.norm2)))

    def _attend(
        self, x: Tensor, angles: tuple[Tensor, Tensor], who: Relation, cache: Cache | None, layer: int
    ) -> Tensor:
        heads, kv_heads = self.config.heads, self.config.num_kv_heads
        qkv = self.qkv(x).view(*x.shape[:2], heads + 2 * kv_heads, self.config.dim)
        if self.config.qk_norm:
            q, k, v = qkv.split_with_sizes((heads, kv_heads, kv_heads), 2)
            qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=2)
        q, k, v = _Turned.apply(qkv, *angles, heads)  # type: ignore[no-untyped-call]
        if cache is not None:
            k, v = cache.update(layer, k, v)
        return attention(q, k, v, who).transpose(1, 2).flatten(2)

    def _mlp(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.config.gated:
            gate, up = up.chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)  # type: ignore[no-any-return]
        return self.down(F.gelu(up, approximate="tanh"))  # type: ignore[no-any-return]


def rotate(
    x: Float[Tensor, "batch row head dim"],
    cos: Float[Tensor, "batch row 1 dim"],
    sin: Float[Tensor, "batch row 1 dim"],
) -> Float[Tensor, "batch row head dim"]:
    """Rotary position: each pair (a, b), from the first and the second half of the head, turned by its angle.

    `(a, b) -> (a cos - b sin, a sin + b cos)`; `cos` and `sin` hold both halves, the first half of `sin` negated.
    """
    if cos.dtype != x.dtype:
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, swapped, sin)


def angles(config: Config) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position times frequency as `rotate` takes them, `[length, dim]`, in float32."""
    frequency = 1.0 / config.rotary_base ** (torch.arange(0, config.dim, 2).float() / config.dim)
    angle = torch.outer(torch.arange(config.length).float(), frequency)
    return torch.cat((angle.cos(), angle.cos()), dim=-1), torch.cat((-angle.sin(), angle.sin()), dim=-1)


class _Turned(torch.autograd.Function):
    """Queries, keys and values apart, `[batch, head, row, dim]`, the first two turned by their angles: `rotate`, with
    a backward pass that turns back in place."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, ...]:
        kv_heads = (qkv.shape[2] - heads) // 2
        qk, v = qkv.split_with_sizes((heads + kv_heads, kv_heads), 2)
        ctx.save_for_backward(cos, sin)
        q, k = rotate(qk, cos, sin).transpose(1, 2).split_with_sizes((heads, kv_heads), 1)
        return q, k, v.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = torch.cat([part.transpose(1, 2) for part in grads], dim=2)
        qk = grad[:, :, : -grads[2].shape[1]]
        qk.copy_(rotate(qk, cos, -sin))
        return grad, None, None, None


@dataclass(frozen=True)
class _Dropout:
    """Sets each number to zero at this rate, and the others that much larger; with no generator, nothing."""

    rate: float
    noise: torch.Generator | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.noise is None or not self.rate:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - self.rate, generator=self.noise)
        return x * kept * (1 / (1 - self.rate))

    def repeatable(self, block: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A block that drops the same numbers when it is run again, and then leaves the generator as it found it."""
        noise = self.noise
        if noise is None or not self.rate:
            return block
        first = noise.get_state()

        def run(*inputs: Any) -> Tensor:
            now = noise.get_state()
            noise.set_state(first)
            try:
                return block(*inputs)
            finally:  # the second time is broken off once it has made what was missing
                if not torch.equal(now, first):
                    noise.set_state(now)

        return run


def _normed(x: Tensor, norm: nn.LayerNorm | nn.RMSNorm) -> Tensor:
    """The norm of each row. At a few rows, calling the module costs a good part of the norm itself."""
    shape: list[int] = list(x.shape[-1:])
    weight = norm.weight if norm.weight.dtype == x.dtype else norm.weight.to(x.dtype)  # gathered in bf16 from shards
    if isinstance(norm, nn.RMSNorm):
        return torch.rms_norm(x, shape, weight, norm.eps)
    bias = norm.bias if norm.bias is None else norm.bias.to(x.dtype)
    return torch.layer_norm(x, shape, weight, bias, norm.eps)


def _norm(config: Config, width: int) -> nn.LayerNorm | nn.RMSNorm:
    if config.rms_norm:
        return nn.RMSNorm(width, config.norm_epsilon)
    return nn.LayerNorm(width, config.norm_epsilon, bias=config.norm_bias)
