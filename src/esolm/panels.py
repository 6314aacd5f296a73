"""Weights of products as the compiled network reads them: in panels, one behind the other, in large pages."""

import torch
from torch import Tensor, nn

from esolm import native
from esolm.denoiser import Denoiser
from esolm.products import Chosen, fits_half, int8_steps

_LINE = 64  # bytes that memory gives at once
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


class Memory:
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

    def __init__(self, linear: nn.Linear, dtype: Chosen, memory: Memory, *, pairs: bool) -> None:
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
