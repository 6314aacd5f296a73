"""A training run as a value: the method, the network, the optimizer, and how long and how often. It does nothing."""

from dataclasses import dataclass, field
from typing import Any, Literal

from esolm import plain
from esolm.algorithms.algorithm import Algorithm
from esolm.denoiser import Config
from esolm.optim import Config as OptimConfig


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run: the method, the network, the optimizer, and how long and how often."""

    algorithm: Algorithm
    network: Config
    num_steps: int
    batch_size: int = 512
    micro_batch: int | None = None  # texts that go through the network at once; None: the whole batch
    optim: OptimConfig = field(default_factory=OptimConfig)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; weights stay float32
    seed: int = 0
    minutes: float | None = None  # stop and save after this long, whatever the step
    log_every: int = 10
    validate_every: int = 1000
    validation_texts: int = 256
    save_every: int = 1000
    keep: int = 3  # newest checkpoints that stay, besides the best
    sample_every: int | None = None  # steps; texts of the averaged weights for the log, always with the same seeds
    sample_texts: int = 2
    shard: bool = False  # with several ranks: each keeps its part of weights, gradients, moments and averages
    recompute: bool = False  # activation checkpointing: less memory for a third more time (Denoiser.recompute)
    compile: bool = False  # blocks by torch.compile; docs/scale.md says where it pays

    def __post_init__(self) -> None:
        least = dict.fromkeys(
            ("num_steps", "batch_size", "log_every", "validate_every", "save_every", "keep", "sample_texts"), 1
        )
        problems = [
            f"{name} must be at least {low}, got {getattr(self, name)}"
            for name, low in {**least, "validation_texts": 2}.items()
            if getattr(self, name) < low
        ]
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch_size:
            problems.append(f"micro_batch must lie in [1, batch_size = {self.batch_size}], got {self.micro_batch}")
        if self.sample_every is not None and self.sample_every < 1:
            problems.append(f"sample_every must be at least 1, got {self.sample_every}: leave it out for no samples")
        if self.minutes is not None and not self.minutes > 0:
            problems.append(f"minutes must be positive, got {self.minutes}: leave it out for no limit")
        if self.shard and self.sample_every is not None:
            problems.append("samples are written by a whole network: leave out sample_every, or shard")
        if problems:
            raise ValueError("; ".join(problems))
        self.algorithm.check(self.network)


def description(run: Run) -> dict[str, Any]:
    """What a checkpoint records of a run: enough to build the model, and the run itself."""
    data: dict[str, Any] = plain.to_plain(run)
    return {"algorithm": plain.to_plain(run)["algorithm"], "network": data["network"], "run": data}
