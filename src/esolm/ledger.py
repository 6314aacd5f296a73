"""The bytes that operations on tensors take, without the numbers: each storage is entered when it is made, and struck
out when nobody has it any more. It knows nothing of what kernels take inside, but counts the shapes of products."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that live while it is on. Whatever comes from a tensor without numbers has none
    either, and so have floating-point numbers made from nothing; ids and flags are real."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.shapes = set[tuple[Any, ...]]()
        """Of the products in bf16, as sizes and strides of what they multiply."""
        self._fake, self._known = FakeTensorMode(allow_non_fake_inputs=True), set[int]()

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if given and not any(isinstance(x, FakeTensor) for x in given):
            out = func(*args, **kwargs)
        else:
            with self._fake:
                out = func(*args, **kwargs)
            if not given and isinstance(out, Tensor) and not out.is_floating_point():
                out = func(*args, **kwargs)
        if func.overloadpacket in _PRODUCTS and given[0].dtype == torch.bfloat16:
            self.shapes.add((func.overloadpacket, *((x.shape, x.stride()) for x in given)))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._enter(x.untyped_storage())
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
