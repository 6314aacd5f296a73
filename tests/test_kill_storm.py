"""Training that saves every step and is killed again and again: every restart finds its newest step whole."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

# Each life is a fork of one process that has imported torch. It is killed at a random moment: while it resumes, steps,
# copies, writes, renames, prunes. `told` is what its log had said is on disk.
NURSERY = """if True:
    import json, os, random, signal, sys, time
    from pathlib import Path
    import torch
    from rich.console import Console
    from esolm import checkpoint, journal, memory, optim, train as training
    from esolm.algorithms import EsoLM
    from esolm.data import Loader
    from esolm.denoiser import Config
    from esolm.tokenizing import tokenize
    from esolm.tokenizer import Tokenizer

    torch.set_num_threads(1)
    folder, (kills, width, seed) = Path(sys.argv[1]), map(int, sys.argv[2:])
    chance = random.Random(seed)
    out = folder / "run"
    text = "the quick brown fox jumps over the lazy dog; " * 30
    data = Loader(tokenize([text], Tokenizer.bytes(), folder / "tokens"), length=16)
    run = training.Run(
        algorithm=EsoLM(alpha_0=0.5), network=Config(vocab_size=258, length=16, width=width, layers=2, heads=2),
        optim=optim.Config(schedule=optim.Schedule(peak=1e-3, warmup=1)),
        num_steps=10**6, batch_size=4, dtype="float32", log_every=1, save_every=1, keep=2,
    )

    memory.needed(run.network, run.optim)  # imports for seconds: once, not in every life

    def live(steps):
        training.train(
            run if steps is None else training.replace(run, num_steps=steps), out, tokenizer=Tokenizer.bytes(),
            data=data, resume=(out / journal.FILE).exists(), console=Console(quiet=True),
        )

    def forked(steps):
        child = os.fork()
        if not child:
            try:
                live(steps)
            except BaseException:
                import traceback
                traceback.print_exc()
            os._exit(1)
        return child

    os.waitpid(forked(3), 0)
    began = time.monotonic()
    os.waitpid(forked(5), 0)
    life = time.monotonic() - began  # to resume and save two steps
    seen = {"told": 5, "most": 0, "partial": 0, "lost": 0, "unloadable": 0, "stale": 0}
    newest = 0
    for kill in range(kills):
        child = forked(None)
        time.sleep(chance.uniform(0, 1.1 * life))
        os.kill(child, signal.SIGKILL)
        if os.WEXITSTATUS(os.waitpid(child, 0)[1]):
            sys.exit("a life ended by itself")
        told = [int(e["text"][5:]) for e in journal.read(out) if e.get("name") == "saved"]
        seen["told"] = max([seen["told"], *told])
        hidden = [path.name for path in out.iterdir() if path.name.startswith(".")]
        seen["most"], seen["partial"] = max(seen["most"], len(hidden)), seen["partial"] + bool(hidden)
        try:
            step = checkpoint.load(out, warn=lambda words: sys.exit(words)).step
        except checkpoint.CheckpointError as problem:
            print(problem, file=sys.stderr)
            seen["unloadable"] += 1
            continue
        seen["lost"] += step < seen["told"]
        seen["stale"] += step < newest
        newest = max(newest, step)
    print(json.dumps({**seen, "step": newest}))
"""


def storm(folder: Path, kills: int, width: int, seed: int) -> dict[str, int]:
    """What became of training that was killed so many times."""
    command = [sys.executable, "-c", NURSERY, str(folder), str(kills), str(width), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def assert_survived(found: dict[str, int], kills: int) -> None:
    assert (found["unloadable"], found["lost"], found["stale"]) == (0, 0, 0), found
    assert found["most"] == 1, found  # temporary folders after a kill
    assert found["partial"] > kills // 20 and found["step"] > kills // 10, found  # kills did fall into saves


def test_training_that_is_killed_a_hundred_times_loses_nothing_that_was_told(tmp_path):
    assert_survived(storm(tmp_path, 100, 32, 0), 100)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_training_that_is_killed_a_thousand_times_loses_nothing_that_was_told(tmp_path):
    found = storm(tmp_path, 1000, 128, random.randrange(2**32))
    print(f"1,000 SIGKILLs, 7 MB of state saved every step: {found}")
    assert_survived(found, 1000)
