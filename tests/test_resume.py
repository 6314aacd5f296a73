"""A run that is killed and resumed, again and again, is the run that nobody disturbed, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from esolm import checkpoint, journal

# Each life is a fork of one process that has imported torch, so that a life costs what its steps cost. It notes for
# each step the digest of the batch and the exact losses, and kills itself in the midst of a step.
NURSERY = """if True:
    import hashlib, json, os, signal, sys, time
    from pathlib import Path
    import torch
    from rich.console import Console
    from esolm import optim, train as training
    from esolm.algorithms import EsoLM
    from esolm.data import Loader
    from esolm.denoiser import Config
    from esolm.shards import TokenData
    from esolm.tokenizing import tokenize
    from esolm.tokenizer import Tokenizer

    torch.set_num_threads(1)
    folder, lives = Path(sys.argv[1]), json.loads(sys.argv[2])
    text = "the quick brown fox jumps over the lazy dog; " * 30
    data = Loader(tokenize([text], Tokenizer.bytes(), folder / "tokens"), length=16)

    def live(name, steps, total, kill, without, resume):
        run = training.Run(
            algorithm=EsoLM(alpha_0=0.5),
            network=Config(vocab_size=258, length=16, width=32, layers=2, heads=2, dropout=0.1),
            optim=optim.Config(
                schedule=optim.Schedule(peak=3e-3, warmup=0.1, decay="cosine"), average=0.95, weight_decay=0.1
            ),
            num_steps=total, batch_size=8, dtype="float32", log_every=1,
            validate_every=7, validation_texts=8, save_every=steps, keep=2,
        )
        learn, begun, seen = training.learn, [], (folder / f"{name}.trace").open("a")

        def learn_and_note(run, network, batch, step, *rest):
            begun[:] = begun or [step]
            if kill and step == begun[0] + steps and step < total:
                while not (folder / name / f"step-{step:09d}").exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            since = step - begun[0]
            terms = learn(run, network, batch, since if without == "random state" else step, *rest)
            digest = hashlib.sha256(batch.tokens.numpy().tobytes()).hexdigest()[:16]
            print(json.dumps([step, digest, {k: v.hex() for k, v in terms.items()}]), file=seen, flush=True)
            return terms

        training.learn = learn_and_note
        if resume and without == "learning rate":
            rate, offset = optim.Schedule.rate, []
            def rate_from_the_start(self, step, total):
                offset[:] = offset or [step]
                return rate(self, step - offset[0], total)
            optim.Schedule.rate = rate_from_the_start
        if resume and without == "data position":
            batch = Loader.batch
            first = []
            def batch_from_the_start(self, step, *rest):
                first[:] = first or [step]
                return batch(self, step - first[0], *rest)
            Loader.batch = batch_from_the_start
        if resume and without == "moments":
            optim.Optimizer.load = lambda *_: None
        if resume and without == "average":
            optim.WeightAverage.load = lambda *_: None
        training.train(
            run, folder / name, tokenizer=Tokenizer.bytes(), data=data, validation=data, resume=resume,
            console=Console(quiet=True),
        )

    for name, steps, total, kill, without, resume in lives:
        child = os.fork()
        if not child:
            try:
                live(name, steps, total, kill, without, resume)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        print(json.dumps([name, -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)]))
"""
CONTROLS = ("random state", "learning rate", "moments", "data position", "average")


def lives(folder: Path, plan: list[tuple]) -> list[int]:
    """Exit codes of lives: (run, steps between checkpoints, steps in all, killed?, what is left out, resumed?)."""
    command = [sys.executable, "-c", NURSERY, str(folder), json.dumps(plan)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return [json.loads(line)[1] for line in done.stdout.splitlines()]


def outcome(folder: Path, name: str, total: int) -> dict[str, object]:
    """All that must be equal at the end of a run: tensors by name, and every step's batch, losses, rate and norm."""
    saved = checkpoint.load(folder / name / f"step-{total:09d}")
    steps = {}
    for line in (folder / f"{name}.trace").read_text().splitlines():
        step, batch, terms = json.loads(line)
        steps[step] = (batch, terms)  # of steps that were done again the later
    figures = ("loss", "rate", "norm", "validation", "validation_error")
    log = [
        {k: e[k] for k in ("step", *figures) if k in e}
        for e in journal.read(folder / name)
        if not {"event", "name"} & e.keys()
    ]
    tensors = {f"model.{k}": v for k, v in saved.model.items()} | {f"ema.{k}": v for k, v in (saved.ema or {}).items()}
    return {"tensors": tensors | saved.optim, "steps": steps, "log": log}


def differences(ours: dict, theirs: dict) -> set[str]:
    """What is not equal bit for bit."""
    assert ours["tensors"].keys() == theirs["tensors"].keys()
    found = {
        kind
        for name, tensor in ours["tensors"].items()
        if not torch.equal(tensor, theirs["tensors"][name])
        for kind in [name.split(".")[0]]
    }
    return found | {part for part in ("steps", "log") if ours[part] != theirs[part]}


def compare(folder: Path, num_lives: int, steps: int) -> None:
    """One run straight, one killed in the midst of the step behind each checkpoint; and the controls."""
    total = num_lives * steps
    plan: list[tuple] = [("straight", steps, total, False, "", False)]
    plan += [("killed", steps, total, True, "", life > 0) for life in range(num_lives)]
    for control in CONTROLS:
        plan += [(control, total // 2, total, True, control, life > 0) for life in range(2)]
    assert lives(folder, plan) == [0, *[-9] * (num_lives - 1), 0, *[-9, 0] * len(CONTROLS)]
    straight = outcome(folder, "straight", total)
    assert len(straight["steps"]) == total and len(straight["tensors"]) > 60
    assert differences(straight, outcome(folder, "killed", total)) == set()
    for control in CONTROLS:
        found = differences(straight, outcome(folder, control, total))
        assert found, f"without the {control} nothing changed"
        print(f"without the {control}: {', '.join(sorted(found))} differ")
        assert {"random state": "steps", "learning rate": "log", "moments": "exp_avg", "data position": "steps",
                "average": "ema"}[control] in found  # fmt: skip


def test_a_run_that_is_killed_and_resumed_is_the_same_run_and_the_comparison_can_tell(tmp_path):
    compare(tmp_path, num_lives=4, steps=5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_steps_straight_and_in_ten_lives(tmp_path):
    compare(tmp_path, num_lives=10, steps=20)
    print("200 steps straight against 10 x (20 steps, SIGKILL, resume): everything equal bit for bit")
