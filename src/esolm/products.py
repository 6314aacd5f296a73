"""The matrix products of a network that only writes, in the dtype and kernel that are fastest on this machine.

    kind              weights are                      reads a weight as   texts independent of their batch
    plain float32     torch's own product              4 bytes             to rounding
    packed float32    laid out for oneDNN beforehand   4 bytes             bit for bit
    packed bfloat16   laid out for oneDNN beforehand   2 bytes             to rounding
    packed int8       a scale for each output          1 byte              to rounding

On a CPU only the products change dtype; the residual stream, norms, attention and its cache stay in float32, which is
as fast there for a few rows. Elsewhere the whole network goes to bf16. `prepared` makes a copy: it changes no network.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esolm.calibrate import bf16_pays, capability
from esolm.denoiser import Denoiser

Dtype = Literal["auto", "float32", "bfloat16", "int8"]

_INT8_COLUMNS = 32  # torch's int8 kernel reads this many inputs at a time, past the end of a shorter row
_INT8_ROWS = 32  # with more rows than this, unpacking the weights once is cheaper than the int8 kernel


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product of the network, as a table lists it."""

    name: str
    inputs: int
    outputs: int
    kind: str
    nbytes: int  # read for every step


def prepared(denoiser: Denoiser, dtype: Dtype = "auto") -> Denoiser:
    """A copy of the network for writing, with its products of this dtype. It can no longer be trained or saved.

    ValueError for int8 away from the CPU, where torch has no such product.
    """
    device = denoiser.embed.weight.device
    dtype = chosen(dtype, device)
    if device.type != "cpu":
        network = copy.deepcopy(denoiser).eval().requires_grad_(False)
        return network.to(torch.bfloat16) if dtype == "bfloat16" else network
    linears = [part for part in denoiser.modules() if isinstance(part, nn.Linear)]
    # what the memo holds is not copied but taken from it: the copy has packed products where the network has linears
    memo: dict[int, object] = {id(linear): _packed(linear, dtype) for linear in linears}
    network = copy.deepcopy(denoiser, memo).eval().requires_grad_(False)
    if dtype != "float32":
        network.embed.to(torch.bfloat16)
    return network


def chosen(dtype: Dtype, device: torch.device) -> Literal["float32", "bfloat16", "int8"]:
    """What `auto` means on this device: bf16 where its products are faster than float32's (measured once), else
    float32. int8 changes the model a little, so it is never chosen for the user."""
    if dtype == "int8" and device.type != "cpu":
        raise ValueError(f"int8 products run on a CPU only, the network is on {device}: use bfloat16 or auto")
    if dtype == "auto":
        return "bfloat16" if bf16_pays(device) else "float32"
    return dtype


def products(denoiser: Denoiser) -> tuple[Product, ...]:
    """The products of a network, prepared or not, in the order of its modules."""
    found = []
    for name, part in denoiser.named_modules():
        if isinstance(part, nn.Linear):
            outputs, inputs = part.weight.shape
            kind, size = f"plain {_name(part.weight.dtype)}", part.weight.element_size()
        elif isinstance(part, Plain | Packed | Int8):
            outputs, inputs, kind, size = part.outputs, part.inputs, part.kind, part.size
        else:
            continue
        found.append(Product(name=name, inputs=inputs, outputs=outputs, kind=kind, nbytes=size * inputs * outputs))
    return tuple(found)


def describe(denoiser: Denoiser) -> str:
    """The kinds of its products, what they read for a step, and what the CPU can do."""
    listed = products(denoiser)
    kinds = Counter(product.kind for product in listed)
    told = " and ".join(f"{number} {kind}" for kind, number in kinds.items())
    megabytes = sum(product.nbytes for product in listed) / 1e6
    return f"{told}, {megabytes:.1f} MB ({capability()}, {torch.get_num_threads()} threads)"


class Plain(nn.Module):
    """A linear layer in another dtype, by torch's own product."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.outputs, self.inputs = linear.weight.shape
        self.size, self.kind = dtype.itemsize, f"plain {_name(dtype)}"
        self._weight = linear.weight.detach().to(dtype, copy=True)
        self._bias = None if linear.bias is None else linear.bias.detach().to(dtype, copy=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self._weight.dtype), self._weight, self._bias).to(x.dtype)


class Packed(nn.Module):
    """A linear layer whose weight is laid out for oneDNN: at few rows two to three times as fast as torch's own.

    In float32 a row's result is the same bit for bit whatever other rows there are.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.outputs, self.inputs = linear.weight.shape
        self.size, self.kind = dtype.itemsize, f"packed {_name(dtype)}"
        self._dtype = dtype
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype))
        self._bias = None if linear.bias is None else linear.bias.detach().to(dtype, copy=True)
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.inputs).to(self._dtype)
        if len(rows) == 1 and self._dtype == torch.float32:  # a lone row has a kernel with other rounding
            rows = rows.repeat(2, 1)
        out: Tensor = self._product(rows, self._weight, self._bias, "none", [], "")
        return out[: x.numel() // self.inputs].to(x.dtype).view(*x.shape[:-1], self.outputs)


class Int8(nn.Module):
    """A linear layer with weights of 8 bits and a bf16 scale for each output; rows are bf16."""

    kind, size = "packed int8", 1

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.outputs, self.inputs = linear.weight.shape
        weight = linear.weight.detach().float()
        largest = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
        self._scale = (largest / 127).bfloat16()
        steps = (weight / self._scale.float()[:, None]).round_().clamp_(-127, 127)
        self._weight = steps.to(torch.int8)
        self._bias = None if linear.bias is None else linear.bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.inputs).to(torch.bfloat16)
        if len(rows) <= _INT8_ROWS:
            out = torch._weight_int8pack_mm(rows, self._weight, self._scale)
        else:
            out = F.linear(rows, self._weight.to(torch.bfloat16)) * self._scale
        out = out.to(x.dtype).view(*x.shape[:-1], self.outputs)
        return out if self._bias is None else out + self._bias


def _packed(linear: nn.Linear, dtype: Literal["float32", "bfloat16", "int8"]) -> nn.Module:
    if dtype == "int8" and linear.weight.shape[1] % _INT8_COLUMNS == 0:
        return Int8(linear)
    kind = Packed if torch.backends.mkldnn.is_available() else Plain  # type: ignore[no-untyped-call]
    return kind(linear, torch.float32 if dtype == "float32" else torch.bfloat16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
