"""The authors' networks -> ours: names changed, and the constant time conditioning folded away, exact up to rounding.

Their adaLN always sees time zero, so its shift, scale and gate are constants, computed here in float64:

    norm(x) * (1 + scale) + shift   ->  the norm's weight and bias
    x + gate * f(x)                 ->  the output rows of f's last matrix and bias

The averaged weights of a training file are a list in the order of the module's parameters; `averaged` names them. It
converts tensors; it reads no file (importers.py does).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from esolm.denoiser import Config

_TIME_FEATURES = 128  # cosines, then as many sines, of time zero: ones, then zeros
_ROTARY_BASE = Config.rotary_base
_NEVER = -1e4  # the logit of an id that must not be written: no probability, and a number in every dtype
_BLOCK = ("norm1", "attn_qkv", "attn_out", "norm2", "mlp.0", "mlp.2", "adaLN_modulation")
_BUFFER = "rotary_emb.inv_freq"

T = TypeVar("T")


def from_authors(
    tensors: Mapping[str, Tensor], length: int, heads: int | None = None
) -> tuple[Config, dict[str, Tensor]]:
    """Configuration and weights of our denoiser from a network of the authors (Eso-LM, MDLM, BD3-LM or AR).

    `tensors` carry their names, without the prefix `backbone.`; `length` is the longest text, which no tensor tells;
    `heads` is needed only where the rotary frequencies are not among the tensors. ValueError for other networks.
    """
    source = {name: tensor.float() for name, tensor in tensors.items()}
    try:
        vocab_size, width = source["vocab_embed.embedding"].shape
        dim = width // heads if heads and _BUFFER not in source else _head_dim(source[_BUFFER])
        if width % dim or heads not in (None, width // dim):
            raise ValueError(f"the rotary frequencies are those of heads of {dim} numbers; the file says {heads} heads")
        layers = sum(name.endswith("attn_qkv.weight") for name in source)
        conditioned = "sigma_map.mlp.0.weight" in source
        config = Config(
            vocab_size=vocab_size,
            length=length,
            width=width,
            layers=layers,
            heads=width // dim,
            mlp_width=len(source["blocks.0.mlp.0.bias"]),
            norm_bias=conditioned,
        )
        return config, _renamed(source, layers, _condition(source) if conditioned else None)
    except KeyError as missing:
        raise ValueError(
            f"these are not the weights of an Eso-LM, MDLM, BD3-LM or AR network of the authors: no tensor {missing}"
        ) from None


def averaged(names: Iterable[str], averages: Sequence[T]) -> dict[str, T]:
    """The averaged weights by name. The authors keep them as a list, in the order of their module's parameters, which
    is not the order of a `state_dict`. ValueError if the list is not of these parameters."""
    known = set(names) - {_BUFFER}
    layers = range(sum(name.endswith("attn_qkv.weight") for name in known))
    modules = ["vocab_embed.embedding", "sigma_map.mlp.0", "sigma_map.mlp.2"]
    modules += [f"blocks.{layer}.{part}" for layer in layers for part in _BLOCK]
    modules += [f"output_layer.{part}" for part in ("norm_final", "linear", "adaLN_modulation")]
    order = [name for at in modules for name in (at, f"{at}.weight", f"{at}.bias") if name in known]
    if other := known - set(order):
        raise ValueError(f"there is no tensor {sorted(other)[0]!r} in the authors' networks, so their order is unknown")
    if len(order) != len(averages):
        raise ValueError(f"there are {len(averages)} averaged weights for {len(order)} parameters")
    return dict(zip(order, averages, strict=True))


def with_mask_last(config: Config, weights: Mapping[str, Tensor], mask_id: int) -> tuple[Config, dict[str, Tensor]]:
    """The same network with its mask as the last id: one id more, and the old one is never written."""
    found = dict(weights)
    for name in ("embed.weight", "head.weight", "head.bias"):
        found[name] = torch.cat((weights[name], weights[name][mask_id : mask_id + 1]))
    found["head.weight"][mask_id] = 0
    found["head.bias"][mask_id] = _NEVER
    return replace(config, vocab_size=config.vocab_size + 1), found


def _head_dim(frequencies: Tensor) -> int:
    """The size of a head, of which every two numbers turn by one frequency."""
    dim = 2 * len(frequencies)
    ours = _ROTARY_BASE ** (-torch.arange(0, dim, 2).double() / dim)
    if not torch.allclose(frequencies.double(), ours, rtol=1e-2, atol=0):  # bf16 has three digits
        raise ValueError(
            f"the rotary frequencies (rotary_emb.inv_freq) are not those of base {_ROTARY_BASE:g}, which the authors' "
            "networks have: these weights are of another kind, or damaged"
        )
    return dim


def _condition(source: Mapping[str, Tensor]) -> Tensor:
    """The vector that their time embedding gives for time zero, which every adaLN sees."""
    time = torch.cat((torch.ones(_TIME_FEATURES), torch.zeros(_TIME_FEATURES))).double()
    weights = {name: source[f"sigma_map.mlp.{name}"].double() for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    hidden = F.silu(F.linear(time, weights["0.weight"], weights["0.bias"]))
    return F.silu(F.linear(hidden, weights["2.weight"], weights["2.bias"]))


def _renamed(source: Mapping[str, Tensor], layers: int, condition: Tensor | None) -> dict[str, Tensor]:
    result = {"embed.weight": source["vocab_embed.embedding"]}
    for layer in range(layers):
        result |= _block(source, f"blocks.{layer}.", condition)
    result |= {f"head.{kind}": source[f"output_layer.linear.{kind}"] for kind in ("weight", "bias")}
    result["norm.weight"] = source["output_layer.norm_final.weight"]
    if condition is not None:
        shift, scale = _modulation(source, "output_layer.", condition, 2)
        result["norm.weight"] = _times(result["norm.weight"], 1 + scale)
        result["norm.bias"] = shift.float()
    return result


def _block(source: Mapping[str, Tensor], at: str, condition: Tensor | None) -> dict[str, Tensor]:
    block = {
        at + "norm1.weight": source[at + "norm1.weight"],
        at + "qkv.weight": source[at + "attn_qkv.weight"],
        at + "out.weight": source[at + "attn_out.weight"],
        at + "norm2.weight": source[at + "norm2.weight"],
        at + "up.weight": source[at + "mlp.0.weight"],
        at + "up.bias": source[at + "mlp.0.bias"],
        at + "down.weight": source[at + "mlp.2.weight"],
        at + "down.bias": source[at + "mlp.2.bias"],
    }
    if condition is None:
        return block
    shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(source, at, condition, 6)
    block[at + "norm1.weight"] = _times(block[at + "norm1.weight"], 1 + scale1)
    block[at + "norm2.weight"] = _times(block[at + "norm2.weight"], 1 + scale2)
    block[at + "norm1.bias"], block[at + "norm2.bias"] = shift1.float(), shift2.float()
    block[at + "out.weight"] = _times(block[at + "out.weight"], gate1[:, None])
    block[at + "down.weight"] = _times(block[at + "down.weight"], gate2[:, None])
    block[at + "down.bias"] = _times(block[at + "down.bias"], gate2)
    return block


def _modulation(source: Mapping[str, Tensor], at: str, condition: Tensor, parts: int) -> tuple[Tensor, ...]:
    weight, bias = source[at + "adaLN_modulation.weight"].double(), source[at + "adaLN_modulation.bias"].double()
    return F.linear(condition, weight, bias).chunk(parts)


def _times(tensor: Tensor, factor: Tensor) -> Tensor:
    return (tensor.double() * factor).float()
