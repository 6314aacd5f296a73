"""Whole training steps, timed: in this process, or by several ranks in processes of their own that wait for their turn.

    step      views, losses, gradients (`train.learn`), their sum over ranks, clipping, AdamW, the averaged weights
    seconds   from when the last rank begins until all have ended
    cores     processor seconds of all ranks for each second: the cores that were at work

The tokens are random, since they change no speed. What a run does between steps (data, journal, checkpoints) is not
in them.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from esolm import own, plain
from esolm.algorithms.algorithm import Batch
from esolm.ranks import ALONE, Ranks, joined
from esolm.state import State
from esolm.tokenizer import Tokenizer
from esolm.train import Run, autocast, learn

_ANSWER = 600.0  # seconds: ranks that share a core are slow, and whoever waits for them sees one that ends at once
_LOOK = 0.2  # seconds between two looks at ranks that are waited for
_END = 10.0  # seconds to end in


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A step of all ranks."""

    seconds: float
    cores: float


def batch_of(run: Run) -> Batch:
    """The global batch of all steps of a run."""
    shape, random = (run.batch_size, run.network.length), torch.Generator().manual_seed(1)
    return Batch.of(torch.randint(0, run.network.mask_id, shape, generator=random))


class Steps:
    """A network that learns, in this process as one of `ranks`."""

    def __init__(self, run: Run, ranks: Ranks = ALONE) -> None:
        self._state = State(run, Tokenizer.bytes(), torch.device("cpu"), None, ranks)
        self._batches: dict[int, Batch] = {}

    def take(self, number: int, batch_size: int) -> Timed:
        """One step with a global batch of so many texts. All ranks must call it."""
        state, ranks = self._state, self._state.ranks
        run = replace(state.working, batch_size=batch_size, micro_batch=state.run.micro_batch)
        if batch_size not in self._batches:
            self._batches[batch_size] = batch_of(run)[slice(*ranks.rows(batch_size))]
        ranks.agree(False)
        began, worked = time.perf_counter(), time.process_time()
        with autocast(run, state.denoiser.device):
            learn(run, state.denoiser, self._batches[batch_size], number, ranks=ranks)
        ranks.reduce(state.denoiser)
        state.update(run.optim.schedule.rate(number, run.num_steps))
        (worked,) = ranks.sums([time.process_time() - worked])
        seconds = time.perf_counter() - began
        return Timed(seconds=seconds, cores=worked / seconds)


class World:
    """Several ranks on this machine, connected as torchrun connects them; a context manager. Between steps they wait
    and take no time. They end with the process that started them."""

    def __init__(self, run: Run, size: int, threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        told = {"run": plain.to_plain(run), "own": own.source(type(run.algorithm)), "threads": threads}
        self._words = [tempfile.TemporaryFile() for _ in range(size)]  # noqa: SIM115  # closed at the end
        self._ranks: list[subprocess.Popen[bytes]] = []
        place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank, words in enumerate(self._words):
            self._ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "esolm.bench.steps", json.dumps(told)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=words,
                    bufsize=0,
                    env={**os.environ, **place, "RANK": str(rank), "OMP_NUM_THREADS": str(threads)},
                )
            )

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.close()
            if kind is not None:
                rank.kill()
        for rank in self._ranks:
            try:
                rank.wait(timeout=_END)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
            assert rank.stdout is not None
            rank.stdout.close()
        for words in self._words:
            words.close()

    def take(self, number: int, batch_size: int, *, sharded: bool) -> Timed:
        """One step of all ranks. ChildProcessError, with its last words, if one of them fails."""
        line = json.dumps({"number": number, "batch_size": batch_size, "sharded": sharded}) + "\n"
        for rank in self._ranks:
            assert rank.stdin is not None
            try:
                rank.stdin.write(line.encode())
            except BrokenPipeError:
                raise self._failed() from None
        answer = self._ranks[0].stdout
        assert answer is not None
        while not select.select([answer], [], [], _LOOK)[0]:
            if any(rank.poll() is not None for rank in self._ranks):
                raise self._failed()
        told = answer.readline()
        if not told:
            raise self._failed()
        return Timed(**json.loads(told))

    def _failed(self) -> ChildProcessError:
        """What the rank that ended first said at last; the others say that it is gone."""
        began = time.monotonic()
        while all(rank.poll() is None for rank in self._ranks) and time.monotonic() - began < _END:
            time.sleep(_LOOK)
        for number, (rank, words) in enumerate(zip(self._ranks, self._words, strict=True)):
            words.seek(0)
            said = words.read().decode(errors="replace").strip().splitlines()
            if rank.poll() is not None and not (said and "another rank" in said[-1]):
                return ChildProcessError(
                    f"rank {number} of {len(self._ranks)} failed: {said[-1] if said else 'killed'}"
                )
        return ChildProcessError(f"one of {len(self._ranks)} ranks failed")


def _serve(told: dict[str, Any]) -> None:
    """One rank: a step for each line of standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it
    torch.set_num_threads(told["threads"])
    if told["own"] is not None:
        own.define(told["own"])
    run, kinds = plain.from_plain(Run, told["run"]), dict[bool, Steps]()
    with joined(answer=_ANSWER) as ranks:
        for line in sys.stdin:
            asked = json.loads(line)
            sharded = asked.pop("sharded")
            if sharded not in kinds:
                kinds[sharded] = Steps(replace(run, shard=sharded), ranks)
            timed = kinds[sharded].take(**asked)
            if ranks.leads:
                sys.stdout.write(json.dumps(asdict(timed)) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
