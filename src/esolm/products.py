"""Matrix products with weights that no longer change, in the dtype and kernel that are fastest on this machine.

    dtype      weights                                     bytes a weight   a row's result depends on other rows
    float32    laid out for oneDNN beforehand              4                never
    float16    rounded, products and sums in float32       2                never (AVX2: in the last bits)
    bfloat16   laid out for oneDNN, rows rounded as well   2                in the last bits
    int8       a bf16 scale an output, rows rounded        1                in the last bits

They take and give float32 rows, on a CPU; `inference` makes networks of them. What each costs in time and in
perplexity: `esolm bench`, docs/log.md.
"""

from abc import ABC, abstractmethod
from functools import cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esolm import plain
from esolm.calibrate import bf16_pays

Dtype = Literal["auto", "float32", "float16", "bfloat16", "int8"]
Chosen = Literal["float32", "float16", "bfloat16", "int8"]

MANY_ROWS = 12  # from here on bf16 products, where the CPU has them, overtake those with float16 weights
_LARGEST_HALF = 65504.0
_INT8_COLUMNS = 32  # torch's int8 kernel reads this many inputs at a time, past the end of a shorter row
_INT8_ROWS = 32  # with more rows than this, unpacking the weights once is cheaper than the int8 kernel


class Product(ABC):
    """A linear layer, `[*rows, inputs] -> [*rows, outputs]`, that only computes: a plain object, since a step makes
    dozens of calls and a module adds to each."""

    kind: str
    size: int  # bytes of a weight

    def __init__(self, linear: nn.Linear) -> None:
        self.outputs, self.inputs = linear.weight.shape

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The product of rows in float32."""

    @property
    def nbytes(self) -> int:
        """Bytes of weights read for a product."""
        return self.size * self.inputs * self.outputs


def chosen(dtype: Dtype, device: torch.device, rows: int = 2, *, engine: bool = False) -> Chosen:
    """What `auto` means on this device for products of this many rows. The CPU is asked, never assumed: float16
    weights where torch has their product, unless bf16 products are faster (measured once) and the rows many.

    int8 changes the model most, so it is never chosen for the user. `engine`: is it the compiled engine's products that
    run? It has all dtypes on every CPU. ValueError for what the device lacks, and for what is no dtype.
    """
    if dtype not in get_args(Dtype):
        names = get_args(Dtype)
        raise ValueError(f"dtype is one of {', '.join(names)}, got {str(dtype)!r}{plain.nearest(str(dtype), names)}")
    if device.type != "cpu":
        if dtype in ("int8", "float16"):
            raise ValueError(f"{dtype} products run on a CPU only, the network is on {device}: use bfloat16 or auto")
        return dtype if dtype != "auto" else "bfloat16" if bf16_pays(device) else "float32"
    if dtype == "float16" and not (engine or half_runs()):
        raise ValueError("this build of torch has no product with float16 weights: use float32, bfloat16 or auto")
    if dtype != "auto":
        return dtype
    if rows < MANY_ROWS and half_runs():
        return "float16"
    return "bfloat16" if bf16_pays(device) else "float32"


@cache
def half_runs() -> bool:
    """Has this torch, on this CPU, products of float32 rows with float16 weights (FBGEMM: x86 with AVX2)?"""
    try:
        eye = torch.eye(4, dtype=torch.float32, device="cpu")
        weight = torch.ops.quantized.linear_prepack_fp16(eye, None)
        return bool((torch.ops.quantized.linear_dynamic_fp16(eye, weight) == eye).all())
    except (RuntimeError, AttributeError):
        return False


def fits_half(weight: Tensor) -> bool:
    """Can float16 hold every number of a weight?"""
    return float(weight.detach().abs().max()) <= _LARGEST_HALF


def table_dtype(dtype: Chosen) -> torch.dtype:
    """Of the embedding, which is looked up and not multiplied: as its products' weights, int8's as bf16."""
    return {"float32": torch.float32, "float16": torch.float16}.get(dtype, torch.bfloat16)


def packed(linear: nn.Linear, dtype: Chosen) -> Product:
    """The product of a linear layer in this dtype, or in the nearest one that can hold it and that torch has here."""
    if dtype == "int8" and linear.weight.shape[1] % _INT8_COLUMNS == 0:
        return Int8(linear)
    if dtype == "float16" and half_runs() and fits_half(linear.weight):
        return Half(linear)
    other = torch.bfloat16 if dtype in ("bfloat16", "int8") else torch.float32
    return Packed(linear, other) if _packs(other) else Plain(linear, other)


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Can oneDNN lay out weights of this dtype on this CPU (bf16: from AVX-512 on)?"""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Plain(Product):
    """A linear layer in another dtype, by torch's own product."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(linear)
        self.size, self.kind = dtype.itemsize, f"plain {_name(dtype)}"
        self._weight = linear.weight.detach().to(dtype, copy=True)
        self._bias = None if linear.bias is None else linear.bias.detach().to(dtype, copy=True)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self._weight.dtype), self._weight, self._bias).to(x.dtype)


class Packed(Product):
    """A linear layer whose weight is laid out for oneDNN: at few rows two to three times as fast as torch's own.

    In float32 a row's result is the same bit for bit whatever other rows there are.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(linear)
        self.size, self.kind = dtype.itemsize, f"packed {_name(dtype)}"
        self._dtype = dtype
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype))
        self._bias = None if linear.bias is None else linear.bias.detach().to(dtype, copy=True)
        self._product = torch.ops.mkldnn._linear_pointwise.default._op

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.inputs).to(self._dtype)
        if len(rows) == 1 and self._dtype == torch.float32:  # a lone row has a kernel with other rounding
            rows = rows.repeat(2, 1)
        out: Tensor = self._product(rows, self._weight, self._bias, "none", [], "")
        return out[: x.numel() // self.inputs].to(x.dtype).view(*x.shape[:-1], self.outputs)


class Half(Product):
    """A linear layer with float16 weights; rows, products and sums are float32. At a few rows it reads its weights as
    fast as memory gives them, and with AVX-512 a row's result is the same bit for bit whatever other rows there are;
    with AVX2 the kernels for one and two rows add in another order."""

    kind, size = "packed float16", 2

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self._weight = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach().float(), bias)
        self._product = torch.ops.quantized.linear_dynamic_fp16.default._op  # what wraps it costs 5 us a call

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim == 1:
            return self(x[None])[0]
        out: Tensor = self._product(x, self._weight)
        return out


class Int8(Product):
    """A linear layer with weights of 8 bits and a bf16 scale for each output; rows are bf16."""

    kind, size = "packed int8", 1

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._weight, self._scale = int8_steps(linear.weight.detach().float())
        self._bias = None if linear.bias is None else linear.bias.detach().clone().float()

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.inputs).to(torch.bfloat16)
        if len(rows) <= _INT8_ROWS:
            out = torch._weight_int8pack_mm(rows, self._weight, self._scale)
        else:
            out = F.linear(rows, self._weight.to(torch.bfloat16)) * self._scale
        out = out.to(x.dtype).view(*x.shape[:-1], self.outputs)
        return out if self._bias is None else out + self._bias


def int8_steps(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight `[output, input]` in whole steps of an output's scale, which is the largest over 127, in bf16."""
    largest = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    scale = (largest / 127).bfloat16()
    return (weight / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
