"""The matrix products of a network that only writes, in the dtype and kernel that are fastest on this machine.

    dtype      weights                                     bytes a weight   a row's result depends on other rows
    float32    laid out for oneDNN beforehand              4                never
    float16    rounded, products and sums in float32       2                never
    bfloat16   laid out for oneDNN, rows rounded as well   2                in the last bits
    int8       a bf16 scale an output, rows rounded        1                in the last bits

On a CPU only the products change; the residual stream, norms, attention and its cache stay in float32, which is as
fast there for a few rows. Elsewhere the whole network goes to bf16. `prepared` makes a copy: it changes no network.
What each costs in time and in perplexity: `esolm bench`, docs/log.md.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esolm.calibrate import bf16_pays, capability
from esolm.denoiser import Denoiser

Dtype = Literal["auto", "float32", "float16", "bfloat16", "int8"]
Chosen = Literal["float32", "float16", "bfloat16", "int8"]

_MANY_ROWS = 12  # from here on bf16 products, where the CPU has them, overtake those with float16 weights
_LARGEST_HALF = 65504.0
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


def prepared(denoiser: Denoiser, dtype: Dtype = "auto", *, rows: int = 2) -> Denoiser:
    """A copy of the network for writing, with its products of this dtype. It can no longer be trained or saved.

    `rows` go through it at once: 2 a text in most plans, all of a text's for MDLM. ValueError for a dtype that the
    device has no product of.
    """
    device = denoiser.embed.weight.device
    dtype = chosen(dtype, device, rows)
    if device.type != "cpu":
        network = copy.deepcopy(denoiser).eval().requires_grad_(False)
        return network.to(torch.bfloat16) if dtype == "bfloat16" else network
    linears = [part for part in denoiser.modules() if isinstance(part, nn.Linear)]
    # what the memo holds is not copied but taken from it: the copy has packed products where the network has linears
    memo: dict[int, object] = {id(linear): _packed(linear, dtype) for linear in linears}
    network = copy.deepcopy(denoiser, memo).eval().requires_grad_(False)
    if dtype != "float32":
        network.embed.to(torch.float16 if dtype == "float16" else torch.bfloat16)
    return network


def chosen(dtype: Dtype, device: torch.device, rows: int = 2) -> Chosen:
    """What `auto` means on this device for products of this many rows. The CPU is asked, never assumed: float16
    weights where torch has their product, unless bf16 products are faster (measured once) and the rows many.

    int8 changes the model most, so it is never chosen for the user. ValueError for what the device lacks.
    """
    if device.type != "cpu":
        if dtype in ("int8", "float16"):
            raise ValueError(f"{dtype} products run on a CPU only, the network is on {device}: use bfloat16 or auto")
        return dtype if dtype != "auto" else "bfloat16" if bf16_pays(device) else "float32"
    if dtype == "float16" and not half_runs():
        raise ValueError("this build of torch has no product with float16 weights: use float32, bfloat16 or auto")
    if dtype != "auto":
        return dtype
    if rows < _MANY_ROWS and half_runs():
        return "float16"
    return "bfloat16" if bf16_pays(device) else "float32"


@cache
def half_runs() -> bool:
    """Has this torch, on this CPU, products of float32 rows with float16 weights (FBGEMM: x86 with AVX2)?"""
    try:
        weight = torch.ops.quantized.linear_prepack_fp16(torch.eye(4), None)
        return bool((torch.ops.quantized.linear_dynamic_fp16(torch.eye(4), weight) == torch.eye(4)).all())
    except (RuntimeError, AttributeError):
        return False


def products(denoiser: Denoiser) -> tuple[Product, ...]:
    """The products of a network, prepared or not, in the order of its modules."""
    found = []
    for name, part in denoiser.named_modules():
        if isinstance(part, nn.Linear):
            outputs, inputs = part.weight.shape
            kind, size = f"plain {_name(part.weight.dtype)}", part.weight.element_size()
        elif isinstance(part, Plain | Packed | Half | Int8):
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


class Half(nn.Module):
    """A linear layer with float16 weights; rows, products and sums are float32. At a few rows it reads its weights as
    fast as memory gives them, and a row's result is the same bit for bit whatever other rows there are."""

    kind, size = "packed float16", 2

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.outputs, self.inputs = linear.weight.shape
        bias = None if linear.bias is None else linear.bias.detach().float()
        self._weight = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach().float(), bias)
        self._product = torch.ops.quantized.linear_dynamic_fp16.default

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 1:
            return self.forward(x[None])[0]
        out: Tensor = self._product(x, self._weight)
        return out


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


def _packed(linear: nn.Linear, dtype: Chosen) -> nn.Module:
    if dtype == "int8" and linear.weight.shape[1] % _INT8_COLUMNS == 0:
        return Int8(linear)
    if dtype == "float16" and float(linear.weight.detach().abs().max()) <= _LARGEST_HALF:
        return Half(linear)
    kind = Packed if torch.backends.mkldnn.is_available() else Plain  # type: ignore[no-untyped-call]
    return kind(linear, torch.bfloat16 if dtype in ("bfloat16", "int8") else torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
