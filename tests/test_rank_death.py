"""A rank that dies or hangs ends all soon, and torchrun's next start goes on from the newest checkpoint, to the bit."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from esolm import checkpoint, journal
from worlds import Worlds

# The rank `who` sends itself a signal in the midst of a step, or of the save at that step.
SCRIPT = """
def live(name, resume=False, who=None, at=5, number="SIGKILL", where="step", answer=120.0, **changes):
    learn, write = training.learn, parts.write

    def fall():
        if os.environ.get("RANK") == str(who):
            os.kill(os.getpid(), getattr(signal, number))

    def learned(run, model, batch, step, *rest):
        terms = learn(run, model, batch, step, *rest)
        if where == "step" and step == at:
            fall()
        return terms

    def written(path, file, tensors):
        if where == "save" and f"step-{at:09d}" in str(path):
            fall()
        write(path, file, tensors)

    training.learn, parts.write = learned, written
    with ranks.joined(answer=answer) as together:
        train(settings(**changes), name, together, resume=resume)
"""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Worlds:
    with Worlds(tmp_path_factory.mktemp("worlds"), SCRIPT) as found:
        yield found


def assert_same(ours: Path, theirs: Path) -> None:
    """Two checkpoints with the same bits: weights, averages, moments, update counts."""
    first, second = checkpoint.load(ours), checkpoint.load(theirs)
    assert first.step == second.step
    for kind in ("model", "ema", "optim"):
        one, other = getattr(first, kind), getattr(second, kind)
        assert one.keys() == other.keys() and len(one) > 10
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("who", "where", "at"), [(1, "step", 5), (0, "save", 6)])
def test_when_a_rank_is_killed_all_end_and_the_next_life_is_the_undisturbed_run(worlds, who, where, at):
    name, settings = f"killed {who} {where}", {"shard": True, "save_every": 2}
    if not (worlds.folder / "straight").exists():
        assert worlds.codes("straight", 2, **settings) == [0, 0]
    codes, seconds = worlds.ended(name, 2, who=who, where=where, at=at, **settings)
    assert sorted(codes) == [-9, 1] and codes[who] == -9
    assert max(seconds) - min(seconds) < 30
    assert "another rank is gone" in worlds.told(name, 1 - who)
    assert checkpoint.load(worlds.folder / name).step == 4
    assert worlds.codes(name, 2, resume=True, **settings) == [0, 0]
    assert_same(worlds.folder / name, worlds.folder / "straight")


@pytest.mark.parametrize(
    ("where", "shard", "words"),
    [
        ("step", False, "another rank did not answer within 8 s"),
        ("save", True, "esolm: rank 0 stops: rank 1 does not answer"),
    ],
)
def test_a_rank_that_hangs_is_noticed_also_while_others_wait_patiently(worlds, where, shard, words):
    """It is stopped, so that its connections stay open. In a save the others would wait half an hour for it."""
    name = f"hung {where}"
    codes, _ = worlds.ended(name, 2, grace=0.5, who=1, where=where, at=4, number="SIGSTOP", answer=8.0, shard=shard)
    assert codes == [1, -9]
    assert words in worlds.told(name, 0)


SETTINGS = ("network.width=32", "network.layers=2", "network.heads=2", "network.length=32", "batch_size=8")


class Torchrun:
    """`torchrun ... esolm train` on two ranks of this machine."""

    def __init__(self, folder: Path, name: str, *, steps: int, shard: bool, restarts: int = 3) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.out, self.log = folder / name, folder / f"{name}.err"
        more = (
            f"num_steps={steps}",
            f"shard={str(shard).lower()}",
            "save_every=10",
            "log_every=1",
            "validate_every=1000",
        )
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
                *("--max-restarts", str(restarts), "--master-port", str(port), "-m", "esolm", "train"),
                *("--out", str(self.out), "--recipe", "demo", "--data", str(folder / "text.txt")),
                *("--vocab-size", "258", "--set", *SETTINGS, *more, "dtype=float32", "sample_every=null"),
            ],
            stderr=self.log.open("w"),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def worker(self, rank: int) -> int | None:
        """The process of a rank that is there now."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                variables = (path / "environ").read_bytes().split(b"\0")
            except (OSError, ValueError):
                continue
            if parent == self._process.pid and f"RANK={rank}".encode() in variables:
                return int(path.name)
        return None

    def reached(self, step: int) -> bool:
        """Wait until a step is in the journal; whether it came before the end."""
        while self._process.poll() is None:
            if (self.out / journal.FILE).exists() and any(e["step"] >= step for e in journal.read(self.out)):
                return True
            time.sleep(0.02)
        return False

    def end(self) -> int:
        return self._process.wait(timeout=280)

    def send(self, number: int) -> None:
        self._process.send_signal(number)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "text.txt").write_text("\f".join("the quick brown fox jumps over the lazy dog; " * 40 for _ in range(60)))
    return folder


def survives(folder: Path, name: str, *, steps: int, at: int, who: int, shard: bool) -> str:
    """One rank is killed when the journal has step `at`; all start again and end well. Before a save, anew."""
    run = Torchrun(folder, name, steps=steps, shard=shard)
    assert run.reached(at), run.log.read_text()
    os.kill(run.worker(who), signal.SIGKILL)
    assert run.end() == 0, run.log.read_text()
    events = [entry["event"] for entry in journal.read(run.out) if "event" in entry]
    told = run.log.read_text()
    assert told.count("exitcode: -9") == 1 and events[-1] == "finished"
    return told


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_starts_a_run_again_that_lost_a_rank_and_it_goes_on_by_itself(folder):
    told = survives(folder, "killed", steps=60, at=20, who=1, shard=True)
    assert "rank 0 stops: another rank is gone" in told
    assert checkpoint.load(folder / "killed").step == 60


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "shards"])
def test_either_rank_killed_at_ten_random_steps(folder, shard):
    kind = "shards" if shard else "replicated"
    assert Torchrun(folder, f"straight {kind}", steps=120, shard=shard).end() == 0
    chance = random.Random()
    for turn in range(10):
        at = chance.randrange(1, 100)
        survives(folder, f"{kind} {turn}", steps=120, at=at, who=turn % 2, shard=shard)
        assert_same(folder / f"{kind} {turn}", folder / f"straight {kind}")
    print(f"{kind}: 10 of 10 kills of a rank, finished with the bits of the undisturbed run")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_passes_a_signal_on_and_all_ranks_save(folder):
    run = Torchrun(folder, "asked to stop", steps=100_000, shard=True, restarts=0)
    assert run.reached(10)
    run.send(signal.SIGTERM)
    code = run.end()
    last = journal.read(run.out)[-1]
    assert code != 0 and last["event"] == "interrupted"
    assert checkpoint.load(run.out).step == last["step"]
    print(f"SIGTERM to torchrun: both ranks saved step {last['step']}; torchrun itself ended with {code}")
