"""Several processes that train one network: who has which rows, what they tell each other, shards of the network.

    torchrun --nproc-per-node 4 -m esolm train ...      rank r of n learns from rows [r B / n, (r + 1) B / n) of a batch

    replicated   every rank has the whole network; gradients are summed once a step
    sharded      every rank has its part of weights, gradients, moments and averages, along the first dimension (FSDP2)

A process that was started alone is the only rank, and every call here gives back what it was given. Nothing else in
the package says `torch.distributed`. There is no tensor or pipeline parallelism, and no rank is replaced while the
others wait: when one dies or does not answer, all end, and torchrun starts them again from the newest checkpoint.
"""

import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from esolm.pairs import Pairs, total
from esolm.pulse import Pulse

PATIENCE = 1800.0  # seconds: while one rank reads the data or writes a checkpoint, the others wait
ANSWER = 25.0  # seconds: inside a step; a rank that does not answer for so long is taken for dead
BUCKET = 2**23  # numbers that are summed over ranks at a time: few messages, and no second copy of all gradients


class Elsewhere(ChildProcessError):
    """Another rank failed, died or does not answer; what failed there it says itself."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    sharded: bool = False
    steps: Any = None  # the group in which ranks must answer soon; the default group is patient
    portions: int = 1  # parts of this rank's rows whose gradients are made one after another (state.portions)
    reducers: tuple["_Reducer", ...] = ()  # of the blocks of a network in shards

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

    def acting(self) -> list["Ranks"]:
        """The ranks, if there were one for each portion of a batch, whose rows together are this one's."""
        size, first = self.size * self.portions, self.rank * self.portions
        return [replace(self, rank=first + each, size=size, portions=1) for each in range(self.portions)]

    def gather(self, values: Sequence[float | int], *, patiently: bool = False) -> list[list[float]]:
        """A few numbers of every rank, by rank."""
        if self.alone:
            return [[float(value) for value in values]]
        import torch.distributed as dist

        own = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=None if patiently else self.steps)
        return [part.tolist() for part in found]

    def sums(self, values: Sequence[float | int]) -> list[float]:
        """Each number summed over ranks, in the order of ranks."""
        return list(values) if self.alone else [sum(each) for each in zip(*self.gather(values), strict=True)]

    def most(self, value: int) -> int:
        """The largest of all ranks' numbers."""
        return int(max(found for (found,) in self.gather([value])))

    def agree(self, flag: bool) -> bool:
        """Whether any rank raised the flag; the same answer on all."""
        return any(found for (found,) in self.gather([float(flag)]))

    def words(self, text: str, *, patiently: bool = False) -> list[str]:
        """A text of every rank, by rank. While all are empty it costs what `agree` costs."""
        if self.alone:
            return [text]
        data = text.encode()
        lengths = [int(length) for (length,) in self.gather([len(data)], patiently=patiently)]
        if not any(lengths):
            return ["" for _ in lengths]
        found = self.gather(list(data.ljust(max(lengths), b" ")))
        return [bytes(map(int, row[:length])).decode() for row, length in zip(found, lengths, strict=True)]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one rank inside fails on all: there with its own error, on the others with `Elsewhere`."""
        try:
            yield
        except Exception as problem:
            self.words(str(problem) or type(problem).__name__, patiently=True)
            raise
        for rank, words in enumerate(self.words("", patiently=True)):
            if words:
                raise Elsewhere(f"rank {rank} failed: {words}")

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
        """Sum the gradients of a replicated network over ranks, the same bits on each. Those of shards are already."""
        if self.alone or self.sharded:
            return
        bucket: list[Tensor] = []
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.agree(any(p.grad is not None for p in parameters)):
            return  # there was nothing to learn, for anybody
        for place, parameter in enumerate(parameters):
            if parameter.grad is None:  # another rank may have one
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(grad.numel() for grad in bucket) < BUCKET and place + 1 < len(parameters):
                continue
            flat = torch.cat([grad.flatten() for grad in bucket])
            self._sum(flat)
            for grad, summed in zip(bucket, torch.split(flat, [grad.numel() for grad in bucket]), strict=True):
                grad.copy_(summed.view_as(grad))
            bucket = []

    def _sum(self, flat: Tensor) -> None:
        """Sum numbers over ranks in their place, and on a CPU in pairs of ranks: they swap halves, then each pair with
        the next one halves of these halves, and so on; then back. As many numbers travel as in a ring."""
        import torch.distributed as dist

        if flat.is_cuda or self.size == 2 or self.size & (self.size - 1):  # two have one order; others have no pairs
            dist.all_reduce(flat, group=self.steps)
            return
        kept, found = flat, torch.empty(len(flat) - len(flat) // 2)
        swapped: list[tuple[int, Tensor, Tensor]] = []
        for other in (self.rank ^ 1 << turn for turn in range(self.size.bit_length() - 1)):
            low, high = kept[: len(kept) // 2], kept[len(kept) // 2 :]
            kept, given = (low, high) if self.rank < other else (high, low)
            self._swap(other, given, found[: len(kept)])
            kept += found[: len(kept)]
            swapped.append((other, kept, given))
        for other, kept, given in reversed(swapped):
            self._swap(other, kept, given)

    def _swap(self, other: int, given: Tensor, found: Tensor) -> None:
        import torch.distributed as dist

        for message in (dist.isend(given, other, self.steps), dist.irecv(found, other, self.steps)):
            assert message is not None
            message.wait()

    def shard(
        self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, dtype: torch.dtype | None = None
    ) -> "Ranks":
        """Leave each rank its part of a network, gathered block by block while it is needed; returns ranks that know.

        The blocks travel in `dtype` if one is given, gradients are summed in float32. Alone there is nothing to do."""
        if self.alone:
            return self
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = DeviceMesh.from_group(self.steps, device.type)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        reducers: tuple[_Reducer, ...] = ()
        for part in (model, *blocks):
            part.set_gradient_divide_factor(1.0)  # type: ignore[operator]  # losses are divided already
            part.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo knows no other
            if device.type == "cpu":
                reducers = (*reducers, _Reducer())
                part.set_custom_reduce_scatter(reducers[-1])  # type: ignore[operator]
        return replace(self, sharded=True, reducers=reducers)

    def accumulate(self, model: nn.Module, *, ends: bool, last: bool) -> None:
        """Before a pass, which `ends` a portion or is even the `last` of a step: gradients of a sharded network are set
        apart after a portion, and travel after the last one."""
        if self.sharded:
            for reducer in self.reducers:
                reducer.last = last
            model.set_requires_gradient_sync(ends if self.reducers else last)  # type: ignore[operator]
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
        part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
        return part

    def part(self, tensor: Tensor) -> Tensor:
        """This rank's part of a whole tensor that a checkpoint holds. Numbers without a dimension are everybody's."""
        return self._cut(tensor) if self.sharded else tensor

    def _cut(self, tensor: Tensor) -> Tensor:
        """As FSDP cuts: equal parts along the first dimension, the last ones smaller or empty."""
        each = -(-len(tensor) // self.size) if tensor.ndim else 0
        return tensor[self.rank * each : (self.rank + 1) * each] if tensor.ndim else tensor

    def whole(self, part: Tensor, weight: Tensor) -> Tensor:
        """The whole of what every rank holds a part of, like this weight; only rank 0 keeps it. All must call it."""
        if not self.sharded:
            return part
        from torch.distributed.tensor import DTensor

        assert isinstance(weight, DTensor)
        found = DTensor.from_local(
            part, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
        ).full_tensor()
        return found.cpu() if self.leads else found.new_empty(0)

    def share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank writes of tensors that all have, or have parts of: its part, and rank 0 what has no parts."""
        if self.alone:
            return dict(tensors)
        kept = {name: tensor for name, tensor in tensors.items() if tensor.ndim or self.leads}
        return kept if self.sharded else {name: self._cut(tensor) for name, tensor in kept.items()}

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

        squares = norms.square()
        dist.all_reduce(squares, group=self.steps)
        return squares.sqrt()


ALONE = Ranks()


class _Reducer:
    """What FSDP calls to sum a block's gradients over ranks: those of portions are added first, and travel once."""

    def __init__(self) -> None:
        self.last = True
        self._portions = Pairs()

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any) -> None:
        import torch.distributed as dist

        self._portions.give({"": input_tensor})
        if not self.last:
            output_tensor.zero_()
            return
        whole = self._portions.take()[""]
        found = torch.empty_like(whole)
        dist.all_to_all_single(found, whole, group=group)
        output_tensor.copy_(total(found.chunk(dist.get_world_size(group))))


class Agreed:
    """A flag that each rank may raise: true on all once it is on one. To ask is a message: all ask equally often."""

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
    rank, size, patience = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=PATIENCE)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=patience))  # type: ignore[attr-defined]
        world = _met(store, rank, size)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = dist.PrefixStore(world, store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        pulse = Pulse(_store(timedelta(seconds=answer)), world, rank, size, answer)
        try:
            dist.barrier()
            pulse.start()
            yield Ranks(rank=rank, size=size, steps=dist.new_group(timeout=timedelta(seconds=answer)))
            dist.barrier()
        finally:
            pulse.stop()
            dist.destroy_process_group()
    except RuntimeError as problem:  # torch says in words only what went wrong between ranks
        if not isinstance(problem, dist.DistError) and "loo" not in str(problem):
            raise
        reason = f"did not answer within {answer:g} s" if "imed out" in str(problem) else "is gone"
        raise Elsewhere(f"rank {rank} stops: another rank {reason}") from problem


def _store(timeout: timedelta) -> Any:
    """A connection to what all ranks read and write, at the place that torchrun tells."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)


def _met(store: Any, rank: int, size: int) -> str:
    """A name that the ranks which are here now share, and none before them had.

    torchrun keeps the store when it starts ranks again, and with it what the dead ones wrote. So each rank makes up a
    name, rank 0 answers every new one with its own, and goes on when all have written under that."""
    name = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", name)
        world: str = store.get(f"answer/{name}").decode()
        store.set(f"{world}/here/{rank}", "")
        return world
    answered: dict[int, bytes] = {}
    since, others = time.monotonic(), range(1, size)
    while not store.check([f"{name}/here/{other}" for other in others]):
        for other in others:
            if store.check([f"hello/{other}"]) and (theirs := store.get(f"hello/{other}")) != answered.get(other):
                store.set(f"answer/{theirs.decode()}", name)
                answered[other] = theirs
        if time.monotonic() - since > PATIENCE:
            raise Elsewhere(f"of {size} ranks not all have come within {PATIENCE:g} s: look at what they say")
        time.sleep(0.02)
    return name


def device(name: str) -> str:
    """The device of this rank: `cuda` becomes the GPU of its place on its machine."""
    if name != "cuda" or "LOCAL_RANK" not in os.environ:
        return name
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return f"cuda:{os.environ['LOCAL_RANK']}"


def started_again() -> bool:
    """Whether torchrun has started these ranks before, and lost one."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
