"""Memory and disks that are too small: training goes on in smaller pieces, or says how much is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esolm import checkpoint, journal, memory

# Trains under a limit of address space that is `room` bytes above what the process has when it begins, or without one.
STARVED = """if True:
    import json, resource, sys
    from pathlib import Path
    import torch
    from rich.console import Console
    from esolm import memory, optim, train as training
    from esolm.algorithms import EsoLM
    from esolm.data import Loader
    from esolm.denoiser import Config
    from esolm.tokenizing import tokenize
    from esolm.tokenizer import Tokenizer

    torch.set_num_threads(1)
    folder, room, options = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    length = options.pop("length", 64)
    sizes = {"width": 64, "layers": 2, "heads": 2, **options.pop("network", {})}
    network = Config(vocab_size=258, length=length, **sizes)
    text = "the quick brown fox jumps over the lazy dog; " * 100
    data = Loader(tokenize([text], Tokenizer.bytes(), folder / "tokens"), length=length)
    run = training.Run(
        algorithm=EsoLM(alpha_0=0.5), network=network, dtype="float32", log_every=1, keep=9,
        optim=optim.Config(schedule=optim.Schedule(peak=1e-3, warmup=1)),
        **{"num_steps": 6, "batch_size": 64, "save_every": 100, **options},
    )
    if room:
        torch.set_num_threads(1)
        torch.randn(64, 64, requires_grad=True).sum().backward()  # threads and libraries that come with a first pass
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    try:
        training.train(
            run, folder / "run", tokenizer=Tokenizer.bytes(), data=data, console=Console(quiet=True)
        )
    except memory.TooLarge as problem:
        print(problem)
        sys.exit(1)
"""


def starved(folder: Path, room: int, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", STARVED, str(folder), str(room), json.dumps(options)]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}  # a second arena, or none, is 64 MB of address space
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in journal.read(folder / "run") if "loss" in entry]


def warnings(folder: Path) -> list[str]:
    return [entry["text"] for entry in journal.read(folder / "run") if entry.get("name") == "warning"]


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's here")


def test_micro_batches_halve_where_memory_runs_out_and_no_loss_changes(tmp_path):
    for name, room in (("free", 0), ("tight", 200_000_000)):  # it halves from 130 to 260 MB at least
        done = starved(tmp_path / name, room, length=256, num_steps=2, network={"width": 128, "layers": 4})
        assert done.returncode == 0, done.stderr
    told = warnings(tmp_path / "tight")
    assert told and told[0].startswith("out of memory: going on with micro batches of 8, the same batch and the same")
    assert not warnings(tmp_path / "free")
    assert losses(tmp_path / "tight") == pytest.approx(losses(tmp_path / "free"), abs=1e-6)
    micro = int(told[-1].split("micro batches of ")[1].split(",")[0])
    assert checkpoint.load(tmp_path / "tight" / "run").state["micro_batch"] == micro


def test_a_network_that_cannot_fit_is_refused_with_the_gigabytes_that_are_missing(tmp_path):
    done = starved(tmp_path, 1_000_000_000, network={"width": 2048, "layers": 4, "heads": 8})
    assert done.returncode == 1 and done.stderr == ""
    words = done.stdout.split()
    wanted, there, missing = (float(words[n - 1]) for n, word in enumerate(words) if word.startswith("GB"))
    # 4 blocks of 12 width^2, two embeddings: 202 million parameters of 20 bytes
    assert wanted == pytest.approx(20 * (4 * 12 * 2048**2 + 2 * 258 * 2048) / 1e9, rel=0.01)
    assert there < 1.0 and missing == pytest.approx(wanted - there, abs=0.011)
    assert not (tmp_path / "run").exists()


def test_one_text_that_cannot_fit_ends_the_run_with_what_is_missing(tmp_path):
    done = starved(tmp_path, 200_000_000, length=4096, batch_size=4, network={"layers": 6})
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("one text at a time (micro_batch=1) needs at least 0.")
    assert " GB more: choose a smaller network.length" in done.stdout


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
         "allocate 4000000000 bytes. Error code 12 (Cannot allocate memory)", 4_000_000_000),
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.1 GiB", 2_684_354_560),
    ],
)  # fmt: skip
def test_errors_of_memory_are_known_with_their_sizes(message, size):
    assert memory.ran_out(RuntimeError(message)) and memory._tried(message) == size
    assert not memory.ran_out(RuntimeError("shapes do not match"))


# A limit on the size of files stands in for a full disk: writing fails with EFBIG until somebody frees space.
FULL = STARVED.replace(
    "    try:\n",
    """
    import signal
    from esolm import train as training
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    learn, free = training.learn, resource.RLIM_INFINITY
    def learn_on_a_disk(run, network, batch, step, *rest):
        full = 12 <= step < 27
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if full else free, free))
        return learn(run, network, batch, step, *rest)
    training.learn = learn_on_a_disk
    look = training.Saving.look
    training.Saving.look = lambda saving: (saving._wait(), look(saving))  # so that each write ends in its own step
    try:
""",
    1,
)


def test_training_goes_on_while_the_disk_is_full_and_saves_as_soon_as_it_is_not(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path), "0", json.dumps({"num_steps": 36, "save_every": 10})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = warnings(tmp_path)
    assert told and all("File too large" in text and "tries again" in text for text in told)
    assert len(told) == 8  # at 20, and at every step up to 27
    assert sorted(int(path.name[5:]) for path in (tmp_path / "run").glob("step-*")) == [10, 28, 30, 36]
    assert len(losses(tmp_path)) == 36
    for path in (tmp_path / "run").glob("step-*"):
        checkpoint.verify(path)
