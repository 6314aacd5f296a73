"""A training step done without numbers, for the bytes that it takes: nothing of it is allocated.

    weights, gradients, two moments, average     the real network and optimizer, of tensors without storage
    activations                                  views, forward, loss and backward over them, each storage in a ledger
    kernels                                      bf16 on a CPU: one for each shape of a product, each as large as here

What depends on the text (who reads whom, which rows have a target) is real and small; all else has a shape, a dtype and
a size, and no numbers. So the peak is that of the operations that training runs, whatever they keep: no formula of
activations is written here. Noise differs from batch to batch: of a few the fullest counts. Parts of a network in
shards are counted as FSDP cuts them. It does not know what kernels take while they run, torch itself, or fragmentation.
`compile=true` is rehearsed as if it were off. On a GPU attention is taken for a fused kernel.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn

from esolm import kernels, objective
from esolm.algorithms.algorithm import Batch, Request, View
from esolm.attention import Relation
from esolm.denoiser import Denoiser
from esolm.ledger import Ledger
from esolm.noise import Noise
from esolm.optim import Optimizer, WeightAverage
from esolm.ranks import BUCKET
from esolm.run import Run
from esolm.state import in_bf16, portions

_DRAWS = 16  # micro batches whose noise is drawn, for the fullest of them
_EXACT = 16  # texts: larger micro batches lie on the line through this one and the one of half as many


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of the fullest rank at the fullest moment of a step."""

    micro_batch: int
    weights: int
    gradients: int
    moments: int
    average: int
    gathered: int  # in shards: weights of other ranks, while they are needed
    activations: int  # all that a pass makes and lets go
    kernels: int  # that oneDNN keeps in a long run, in bf16 on a CPU
    saving: int  # the copy that is written while training goes on, where it lies in the same memory

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The bytes by what they are."""
        return {name: value for name, value in asdict(self).items() if name != "micro_batch"}


class Rehearsal:
    """The steps of one rank, done without numbers; `of` gives the bytes at a size of micro batches."""

    def __init__(self, run: Run, ranks: int, device: str) -> None:
        self.run, self.ranks, self.device = run, ranks, device
        self.sharded = run.shard and ranks > 1
        self.texts = self._portion(run.batch_size)
        # a GPU that is not here is taken for one of those that have bf16
        self.bf16 = run.dtype == "auto" if device == "cuda" and not torch.cuda.is_available() else False
        self.bf16 = self.bf16 or in_bf16(run, torch.device(device))
        # measured before anything leaves holes in memory
        self._kernel = kernels.bytes_of_one() if self.bf16 and device == "cpu" else 0
        self._network = _shapes(run)
        self._passing: dict[int, tuple[int, int]] = {}

    @property
    def parameters(self) -> int:
        return self._network.num_parameters

    @property
    def copy(self) -> int:
        """Bytes of the copy that one rank alone makes to save while training goes on (saving.py)."""
        return self._kept * 4 * self.parameters if self.ranks == 1 else 0

    @property
    def _kept(self) -> int:
        """Numbers that a checkpoint holds of each parameter."""
        return 3 if self.run.optim.average is None else 4

    @cached_property
    def cache(self) -> int:
        network, request = self.run.network, Request(length=self.run.network.length)
        order = self.run.algorithm.plan(request, np.random.default_rng(0))
        capacity = int(order.shown.max()) if order.closed.any() else 0
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        cache = network.cache(1, capacity, dtype, torch.device("meta"))
        return sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))

    def of(self, micro_batch: int) -> Footprint:
        """The bytes with micro batches of so many texts, or of a portion if that is smaller."""
        micro_batch = min(micro_batch, self._portion(micro_batch))
        part = self._part(self._network) if self.sharded else 4 * self.parameters
        return Footprint(
            micro_batch=micro_batch,
            weights=part,
            gradients=self._gradients(micro_batch) + 4 * self.parameters * self._held(micro_batch),
            moments=2 * part,
            average=part if self._kept == 4 else 0,
            gathered=self._gathered() if self.sharded else 0,
            activations=self._activations(micro_batch),
            kernels=self._kernels(micro_batch),
            saving=self.copy if self.device == "cpu" else 0,
        )

    def _part(self, module: nn.Module) -> int:
        """Bytes of the largest part of a network: cut along the first dimension, each tensor for itself."""
        return sum(4 * -(-len(p) // self.ranks) * p[0].numel() for p in module.parameters())

    def _gathered(self) -> int:
        """Embedding, last norm and head stay whole during a step; of the blocks one is in use, and the next is there
        twice: as it travels, and unpacked."""
        return self._root + 3 * self._block // (2 if self.bf16 else 1)

    def _portions(self, micro_batch: int) -> int:
        """Of a batch, on each rank."""
        run = replace(self.run, micro_batch=min(micro_batch, self.run.batch_size))
        return portions(run, self.ranks, torch.device(self.device)) // self.ranks

    def _portion(self, micro_batch: int) -> int:
        """The texts of the largest portion."""
        return -(-self.run.batch_size // (self.ranks * self._portions(micro_batch)))

    def _held(self, micro_batch: int) -> int:
        """The gradients that are kept whole while those of another portion are made (pairs.py)."""
        return self._portions(micro_batch).bit_length() - 1

    def _gradients(self, micro_batch: int) -> int:
        """Those of a portion. In shards they go away to be summed after its last pass: before, of several passes, all
        are whole."""
        whole = not self.sharded or len(self._views(micro_batch)) > 1
        return 4 * self.parameters if whole else self._part(self._network) + self._root + self._block

    @property
    def _block(self) -> int:
        return 4 * sum(p.numel() for p in self._network.blocks[0].parameters())

    @property
    def _root(self) -> int:
        return 4 * self.parameters - self._block * len(self._network.blocks)

    def _activations(self, micro_batch: int) -> int:
        if micro_batch > _EXACT:
            low, high = self._activations(_EXACT // 2), self._activations(_EXACT)
            return high + (high - low) * (micro_batch - _EXACT) // (_EXACT - _EXACT // 2)
        passing, _ = self._rehearsed(micro_batch)
        if self.sharded:
            return max(passing, self._root)  # which is there twice when it has come, before the first pass
        return passing if self.ranks == 1 else max(passing, self._summed())

    def _kernels(self, micro_batch: int) -> int:
        """As many as steps have shapes of products: where rows differ from step to step, soon as many as are kept, as
        some draws show enough sizes for that if many steps do."""
        if not self._kernel:
            return 0
        micro_batch = min(micro_batch, _EXACT)
        _, shapes = self._rehearsed(micro_batch)
        sizes = {tuple(map(_sizes, views)) for views in self._draws(micro_batch)}
        return min(kernels.KEPT, shapes * min(self.run.num_steps, len(sizes))) * self._kernel

    def _summed(self) -> int:
        """What replicated ranks need to sum their gradients; more than two swap halves."""
        largest = max(4 * p.numel() for p in self._network.parameters())
        bucket = min(4 * self.parameters, 4 * BUCKET + largest)
        return bucket if self.ranks == 2 else bucket * 3 // 2

    def _rehearsed(self, micro_batch: int) -> tuple[int, int]:
        """The peak of a step above what is there before and after it, and its number of shapes of products in bf16."""
        if micro_batch in self._passing:
            return self._passing[micro_batch]
        ledger, views, network = Ledger(), self._views(micro_batch), _shapes(self.run)
        fused = Relation(causal=True) if self.device == "cuda" else None  # keeps what FlexAttention keeps
        with ledger:
            _give_sizes(network, torch.bfloat16 if self.bf16 and self.sharded else torch.float32)
            state = [Optimizer(network, self.run.optim)]
            average = None if self._kept == 3 else WeightAverage(network)
            before = ledger.live
            sent = _Sent(network, self.ranks, len(views)) if self.sharded else None
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
                for view in views:
                    _learn(network, view, fused)
        del state, average, sent
        found = max(0, ledger.peak - before - self._gradients(micro_batch)), len(ledger.shapes)
        self._passing[micro_batch] = found
        return found

    def _views(self, micro_batch: int) -> Sequence[View]:
        """What the passes of a portion show, of two micro batches at most: from the second on there are gradients."""
        views = max(self._draws(micro_batch), key=_fullness)
        return views * 2 if micro_batch < self._portion(micro_batch) else views

    def _draws(self, micro_batch: int) -> list[tuple[View, ...]]:
        """What some micro batches show."""
        run, beyond = self.run, self.run.batch_size - micro_batch
        batch = Batch.of(torch.zeros(micro_batch, run.network.length, dtype=torch.int64))
        found = []
        for draw in range(_DRAWS):  # from all over the batch: what is early in it may be shown little noise
            start = draw * beyond // (_DRAWS - 1)
            noise = Noise(seed=run.seed, step=draw, start=start, stop=start + micro_batch, total=run.batch_size)
            found.append(run.algorithm.views(batch, noise, run.network.mask_id))
        return found


class _Sent:
    """Gradients of a network in shards, block by block: added up whole, and in the last pass sent as FSDP and gloo do
    it, laid end to end and copied; what comes back is a part. What was sent stays until the next block is."""

    def __init__(self, network: Denoiser, ranks: int, passes: int) -> None:
        self._ranks = ranks
        self._whole: dict[nn.Parameter, Tensor] = {}
        self._stays: list[Tensor] = []
        self._sent: Tensor | None = None
        blocks = [list(block.parameters()) for block in network.blocks]
        inside = {parameter for block in blocks for parameter in block}
        for group in (*blocks, [p for p in network.parameters() if p not in inside]):
            left = itertools.count(passes - 1, -1)
            for parameter in group:
                parameter.register_post_accumulate_grad_hook(partial(self._took, group, left))  # type: ignore[no-untyped-call]

    def _took(self, group: list[nn.Parameter], left: Iterator[int], _: Tensor) -> None:
        if any(parameter.grad is None for parameter in group):
            return
        for parameter in group:
            parameter.grad = None
            if parameter not in self._whole:
                self._whole[parameter] = torch.empty(parameter.shape)
        if not next(left):
            self._sent = torch.empty(sum(parameter.numel() for parameter in group))
            for parameter in group:
                del self._whole[parameter]
            copy = self._sent.clone()
            self._stays.append(torch.empty(-(-len(copy) // self._ranks)))


def _shapes(run: Run) -> Denoiser:
    """The network of a run on the meta device: shapes, and nothing behind them."""
    with torch.device("meta"):
        network = Denoiser(run.network)
    network.recompute = run.recompute
    return network


def _give_sizes(network: Denoiser, dtype: torch.dtype) -> None:
    """Put tensors that a ledger counts in the place of those on the meta device: a block's weights in this dtype, in
    which they come from shards, the others in float32."""
    blocks = set(network.blocks.modules())
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            made = torch.empty(parameter.shape, dtype=dtype if module in blocks else torch.float32)
            setattr(module, name, nn.Parameter(made))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape))


def _learn(network: Denoiser, view: View, who: Relation | None) -> None:
    """The gradients of a view, as train.learn makes them."""
    loss, _ = objective.of_view(network, view, torch.Generator().manual_seed(0), who)
    (loss / view.num_tokens).backward()  # type: ignore[no-untyped-call]


def _sizes(view: View) -> tuple[int, int]:
    """Rows and targets, as many of them as go through the head."""
    targets = int((view.weights != 0).sum())
    return view.tokens.numel(), targets + -targets % objective.MULTIPLE


def _fullness(views: Sequence[View]) -> int:
    """Rows and targets of the fullest view."""
    return max(sum(_sizes(view)) for view in views)
