"""Several processes that train one network: who has which rows, what they tell each other, and shards of the network.

    torchrun --nproc-per-node 4 -m esolm train ...      rank r of n learns from rows [r B / n, (r + 1) B / n) of each batch

    replicated   every rank has the whole network; gradients are summed once a step
    sharded      every rank has its part of weights, gradients, moments and averages, along the first dimension (FSDP2)

A process that was started alone is the only rank, and every call here gives back what it was given. Nothing else in the
package says `torch.distributed`. There is no tensor or pipeline parallelism, and no rank is replaced while the others wait:
when one dies or does not answer, all end, and torchrun starts them again from the newest checkpoint.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

PATIENCE = 1800.0  # seconds: while one rank reads the data or writes a checkpoint, the others wait
ANSWER = 25.0  # seconds: inside a step; a rank that does not answer for so long is taken for dead
_BUCKET = 2**23  # numbers that are summed over ranks at a time: few messages, and no second copy of all gradients


class Elsewhere(ChildProcessError):
    """Another rank failed; it says itself at what."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    sharded: bool = False
    steps: Any = None  # the group in which ranks must answer soon; the default group is patient

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes the journal and the terminal."""
        return self.rank == 0

    def rows(self, total: int) -> tuple[int, int]:
        """The first row of a global batch that is this rank's, and the one after its last. ValueError for too few."""
        if total < self.size:
            raise ValueError(f"a batch of {total} texts is too small for {self.size} ranks: raise batch_size")
        return self.rank * total // self.size, (self.rank + 1) * total // self.size

    def gather(self, values: Sequence[float], *, patiently: bool = False) -> list[list[float]]:
        """A few numbers of every rank, by rank."""
        if self.alone:
            return [list(values)]
        import torch.distributed as dist

        own = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=None if patiently else self.steps)
        return [part.tolist() for part in found]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each number summed over ranks, in the order of ranks."""
        return list(values) if self.alone else [sum(each) for each in zip(*self.gather(values), strict=True)]

    def most(self, value: int) -> int:
        """The largest of all ranks' numbers."""
        return int(max(found for (found,) in self.gather([value])))

    def agree(self, flag: bool, *, patiently: bool = False) -> bool:
        """Whether any rank raised the flag; the same answer on all."""
        return any(found for (found,) in self.gather([float(flag)], patiently=patiently))

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one rank inside fails on all: there with its own error, on the others with `Elsewhere`."""
        try:
            yield
        except Exception:
            self.agree(True, patiently=True)
            raise
        if self.agree(False, patiently=True):
            raise Elsewhere("another rank failed")

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Rank 0 goes through the body alone, then the others, which find what it has made."""
        if self.leads:
            with self.together():
                yield
        else:
            with self.together():
                pass
            yield

    def reduce(self, model: nn.Module) -> None:
        """Sum the gradients of a replicated network over ranks, the same bits on each. Sharded ones are summed already."""
        if self.alone or self.sharded:
            return
        import torch.distributed as dist

        bucket: list[Tensor] = []
        parameters = [p for p in model.parameters() if p.requires_grad]
        for place, parameter in enumerate(parameters):
            if parameter.grad is None:  # another rank may have one
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(grad.numel() for grad in bucket) < _BUCKET and place + 1 < len(parameters):
                continue
            flat = torch.cat([grad.flatten() for grad in bucket])
            dist.all_reduce(flat, group=self.steps)
            for grad, summed in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(summed.view_as(grad))
            bucket = []

    def shard(self, model: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype | None = None) -> "Ranks":
        """Leave each rank its part of a network, gathered block by block while it is needed; returns ranks that know.

        The blocks travel in `dtype` if one is given, gradients are summed in float32. Alone there is nothing to do."""
        if self.alone:
            return self
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = DeviceMesh.from_group(self.steps, next(model.parameters()).device.type)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        for part in (model, *blocks):
            part.set_gradient_divide_factor(1.0)  # type: ignore[operator]  # losses are divided already
        return replace(self, sharded=True)

    def accumulate(self, model: nn.Module, *, last: bool) -> None:
        """Before a pass: gradients of a sharded network travel after the last one of a step only."""
        if self.sharded:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
            model.set_is_last_backward(last)  # type: ignore[operator]

    def rest(self, model: nn.Module) -> None:
        """After passes without gradients: let go of gathered weights, which would grow old."""
        if self.sharded:
            for part in model.modules():
                if type(part).__name__.startswith("FSDP"):
                    part.reshard()  # type: ignore[operator]

    def own(self, tensor: Tensor) -> Tensor:
        """This rank's part of a sharded weight or gradient, sharing its memory; of any other tensor, itself."""
        if not self.sharded:
            return tensor
        part: Tensor = tensor.detach().to_local()  # type: ignore[operator]
        return part

    def part(self, tensor: Tensor) -> Tensor:
        """This rank's part of a whole tensor that a checkpoint holds. Numbers without a dimension are everybody's."""
        if not self.sharded or not tensor.ndim:
            return tensor
        each = -(-len(tensor) // self.size)
        return tensor[self.rank * each : (self.rank + 1) * each]

    def whole(self, part: Tensor, weight: Tensor) -> Tensor:
        """The whole of what every rank holds a part of, like this weight: on rank 0 it counts. All ranks must call it."""
        if not self.sharded:
            return part
        from torch.distributed.tensor import DTensor

        assert isinstance(weight, DTensor)
        found = DTensor.from_local(
            part, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
        ).full_tensor()
        return found.cpu() if self.leads else found.new_empty(0)

    def wholes(self, parts: dict[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors of a checkpoint, one at a time: of weights, or of `kind.weight`, as moments are named."""
        if not self.sharded:
            return parts
        like = {name: weights.get(name, weights.get(name.partition(".")[2])) for name in parts}
        assert None not in like.values()
        return {name: self.whole(part, like[name]) if part.ndim else part for name, part in parts.items()}  # type: ignore[arg-type]

    def norms(self, norms: Tensor) -> Tensor:
        """The norms of whole gradients from those of this rank's parts; what is not finite anywhere is so here."""
        if not self.sharded:
            return norms
        import torch.distributed as dist

        squares = norms.double().square()
        dist.all_reduce(squares, group=self.steps)
        return squares.sqrt()


ALONE = Ranks()


class Agreed:
    """A flag that each rank may raise: true on all as soon as it is on one. To ask is a message, so all ask equally often."""

    def __init__(self, ranks: Ranks, flag: object) -> None:
        self._ranks, self._flag, self._up = ranks, flag, False

    def __bool__(self) -> bool:
        self._up = self._up or self._ranks.agree(bool(self._flag))
        return self._up


class Parts(Mapping[str, Tensor]):
    """The parts of a rank of the tensors of a checkpoint, cut as they are asked for."""

    def __init__(self, ranks: Ranks, whole: Mapping[str, Tensor]) -> None:
        self._ranks, self._whole = ranks, whole

    def __getitem__(self, name: str) -> Tensor:
        return self._ranks.part(self._whole[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)


@contextmanager
def joined(*, answer: float = ANSWER) -> Iterator[Ranks]:
    """The ranks that torchrun started, connected while inside; alone where it did not.

    `answer`: seconds in which a rank must answer inside a step. ValueError where the other ranks cannot be found."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    import torch.distributed as dist

    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is set but not {', '.join(missing)}: start several ranks with torchrun")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE))
    try:
        dist.barrier()
        yield Ranks(rank=rank, size=size, steps=dist.new_group(timeout=timedelta(seconds=answer)))
    finally:
        dist.destroy_process_group()


def device(name: str) -> str:
    """The device of this rank: `cuda` becomes the GPU of its place on its machine."""
    if name != "cuda" or "LOCAL_RANK" not in os.environ:
        return name
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return f"cuda:{os.environ['LOCAL_RANK']}"


def started_again() -> bool:
    """Whether torchrun has started these ranks before, and lost one."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
