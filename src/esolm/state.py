"""What changes as a run goes on, and what its checkpoints hold: weights, moments, their average, the step.

    State(run, ...)           the first weights, a function of the seed
    state.update(rate)        clip, one step of AdamW, one of the average
    state.snapshot()          as a checkpoint            state.restore(folder)     and back

Of several ranks each has the whole, or in shards its part. It computes no loss and decides nothing (train.py).
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esolm import checkpoint, memory, plain
from esolm.calibrate import bf16_pays
from esolm.denoiser import Denoiser
from esolm.optim import Optimizer, WeightAverage
from esolm.ranks import ALONE, Parts, Ranks
from esolm.run import Run, description
from esolm.tokenizer import Tokenizer

_PORTIONS = 4  # of a batch, or more where a run begins on more ranks
_PORTION = 4096  # tokens


class State:
    """The network, its optimizer and average, and the step; on every rank."""

    def __init__(
        self,
        run: Run,
        tokenizer: Tokenizer,
        device: torch.device,
        origin: Mapping[str, Any] | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.run = run
        self.tokenizer = tokenizer
        self.origin = dict(origin or {})
        bf16 = ranks.agree(in_bf16(run, device))  # machines of several kinds may differ in what pays
        # the run as this machine does it: its dtype, and the most texts that any rank ever learns from at once
        self.portions = portions(run, ranks.size, device)
        ranks = replace(ranks, portions=self.portions // ranks.size)
        rows = -(-run.batch_size // self.portions)
        micro = min(rows, run.micro_batch or rows)
        self.working = replace(run, dtype="bfloat16" if bf16 else "float32", micro_batch=micro)
        self.denoiser = Denoiser(run.network, torch.Generator().manual_seed(run.seed))
        self.denoiser.recompute, self.ranks = run.recompute, ranks
        if run.compile:
            for block in self.denoiser.blocks:
                block.compile(dynamic=True)
        if run.shard:  # before the network goes to the device, which may not hold the whole
            dtype = torch.bfloat16 if bf16 else None
            self.ranks = ranks.shard(self.denoiser, list(self.denoiser.blocks), device, dtype)
        self.denoiser.to(device)
        self.optimizer = Optimizer(self.denoiser, run.optim, self.ranks)
        decay = run.optim.average
        self.average = None if decay is None else WeightAverage(self.denoiser, decay, self.ranks)
        self.step = 0
        self.validation: float | None = None  # nats a token, when it was last measured
        self.bits_per_byte: float | None = None  # the same of the text's bytes
        self._before, self._since = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent, interruptions left out."""
        return self._before + time.monotonic() - self._since

    @property
    def micro_batch(self) -> int:
        """Texts that go through the network at once, on each rank."""
        assert self.working.micro_batch is not None
        return min(-(-self.run.batch_size // self.ranks.size), self.working.micro_batch)

    def halve(self, problem: BaseException) -> None:
        """Smaller micro batches from now on, and no sums of portions. TooLarge if they are of one text already."""
        if self.micro_batch == 1:
            raise memory.one_text_too_large(problem, self.denoiser.device) from None
        self.working = replace(self.working, micro_batch=self.micro_batch // 2)
        self.portions, self.ranks = self.ranks.size, replace(self.ranks, portions=1)
        if self.denoiser.device.type == "cuda":
            torch.cuda.empty_cache()

    def skip(self) -> None:
        """A step without an update."""
        self.optimizer.forget()
        self.step += 1

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the network has the averaged weights, where there are any."""
        return self.average.swapped() if self.average else nullcontext()

    def update(self, rate: float) -> float:
        """Clip, update, average; returns the norm that the gradient had. Raises NotFinite."""
        norm = self.optimizer.clip()
        self.optimizer.update(rate)
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        return norm

    def facts(self) -> dict[str, Any]:
        """What the journal notes of the run as it begins."""
        facts = {"method": repr(self.run.algorithm), "parameters": self.denoiser.num_parameters, "seed": self.run.seed}
        return facts if self.ranks.alone else {**facts, "ranks": self.ranks.size, "sharded": self.ranks.sharded}

    def weights(self) -> dict[str, Tensor]:
        """This rank's weights, by name."""
        return {name: self.ranks.own(parameter) for name, parameter in self.denoiser.named_parameters()}

    def snapshot(self) -> checkpoint.Checkpoint:
        """What is saved: on rank 0 all weights, on every rank its share of the optimizer's state."""
        like = dict(self.denoiser.named_parameters())
        return checkpoint.Checkpoint(
            step=self.step,
            model=self.ranks.wholes(self.weights(), like),
            ema=self.ranks.wholes(self.average.state(), like) if self.average else None,
            optim=self.ranks.share(self.optimizer.state()),
            config=description(self.run),
            tokenizer_json=self.tokenizer.to_json(),
            state={
                "seconds": self.seconds,
                "origin": self.origin,
                "micro_batch": self.working.micro_batch,
                "portions": self.portions,
                "validation": self.validation,
                "bits_per_byte": self.bits_per_byte,
            },
        )

    def restore(self, folder: Path) -> None:
        """Go on from the newest good checkpoint of a folder. ValueError if it is another run's."""
        with self.ranks.together():
            saved = checkpoint.load(folder)
            if saved.config["network"] != plain.to_plain(self.run.network):
                raise ValueError(f"the run in {folder} has another network: resume it with the options it began with")
        if len({step for (step,) in self.ranks.gather([saved.step])}) > 1:
            raise checkpoint.CheckpointError(f"{folder} has another newest step on another rank: all must share it")
        self._write(saved.model)
        self.optimizer.load(Parts(self.ranks, saved.optim))
        if self.average is not None:
            self.average.load(Parts(self.ranks, saved.ema or saved.model))  # where there was no average yet
        self._share_out(saved)
        self.step, self.validation = saved.step, saved.state.get("validation")
        self.bits_per_byte = saved.state.get("bits_per_byte")
        self._before, self._since = float(saved.state["seconds"]), time.monotonic()

    def _share_out(self, saved: checkpoint.Checkpoint) -> None:
        """The passes of the ranks that the run began on: no larger, and its portions if they can be dealt out."""
        micro = _count(saved, "micro_batch", self.micro_batch)
        if saved.config["run"].get("micro_batch") == self.run.micro_batch:  # else another is wanted from now on
            self.working = replace(self.working, micro_batch=micro)
        self.portions = _count(saved, "portions", _count(saved, "began_on", _count(saved, "ranks", 1)))
        dealt = self.portions // self.ranks.size if self.portions % self.ranks.size == 0 else 1
        self.ranks = replace(self.ranks, portions=dealt)

    def take_weights(self, path: Path) -> None:
        """Begin with the (averaged) weights of a checkpoint of the same network and tokenizer."""
        with self.ranks.together():
            saved = checkpoint.load(path, optimizer=False)
        theirs, ours = saved.config["network"], plain.to_plain(self.run.network)
        for name in ours:
            if name != "dropout" and theirs.get(name) != ours[name]:
                raise ValueError(f"{path} has {name} = {theirs.get(name)}, this run {ours[name]}: choose the same")
        if saved.tokenizer_json != self.tokenizer.to_json():
            raise ValueError(f"{path} was trained with another tokenizer: train with its own (tokenizer.json in it)")
        self._write(saved.ema or saved.model)
        if self.average is not None:
            self.average = WeightAverage(self.denoiser, self.average.decay, self.ranks)

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        own = self.weights()
        if own.keys() != weights.keys():
            raise ValueError(f"weights of another network: {sorted(own.keys() ^ weights.keys())[0]} is in one only")
        for name, parameter in own.items():
            parameter.copy_(self.ranks.part(weights[name]))


def portions(run: Run, size: int, device: torch.device) -> int:
    """In how many portions the gradients of a batch are summed, by so many ranks or by others that go on with the run.

    On a CPU at least four, so that one, two and four ranks do the same passes: for a process alone, or where a micro
    batch is asked for, only if that takes no more time, so that portions have 4,096 tokens (docs/log.md) or are micro
    batches anyway. On a GPU, which likes large passes, one a rank."""
    found, micro = size, run.micro_batch or run.batch_size
    sparing = size == 1 or run.micro_batch is not None
    while device.type == "cpu" and found < _PORTIONS:
        texts = run.batch_size // (2 * found)
        if not texts or (sparing and texts < micro and texts * run.network.length < _PORTION):
            break
        found *= 2
    return found


def in_bf16(run: Run, device: torch.device) -> bool:
    """Whether products are in bf16: where the run wants them so, or where they are faster and it leaves the choice."""
    return run.dtype == "bfloat16" or (run.dtype == "auto" and bf16_pays(device))


def _count(saved: checkpoint.Checkpoint, name: str, default: int) -> int:
    """A number that a checkpoint's state may have. CheckpointError if it is no count."""
    value = saved.state.get(name)
    if value is None:  # of a version that noted none
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise checkpoint.CheckpointError(f"state.json of step {saved.step} has {name} = {value!r}; expected a count")
    return value
