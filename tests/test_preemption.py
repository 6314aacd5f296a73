"""SIGTERM, SIGINT and SIGUSR1 at any moment: saved and resumable, or nothing to save; a second SIGINT ends at once."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from esolm import checkpoint, journal

PATIENCE = 60.0  # seconds that a busy machine may take; the full form prints what it took
SAVED, INTERRUPTED, TERMINATED = 75, 130, 143

# Forks `esolm train` again and again, sends each the signals of its life and says how it ended and how soon.
NURSERY = """if True:
    import json, os, signal, sys, time
    from pathlib import Path
    import torch
    from esolm import cli, signals, train
    import esolm.prepare, esolm.recipes

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts behind ignore it
    for name, options, waits, sent in json.loads(sys.argv[2]):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            log = os.open(Path(sys.argv[1]) / f"{name}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(log, 2)
            begin, learn = signals._handled, train.learn
            def handled(handlers):
                os.write(writing, b"h")  # a signal from here on is ours; before, it is Python's
                return begin(handlers)
            def learned(*arguments):
                os.write(writing, b"l")
                return learn(*arguments)
            signals._handled, train.learn = handled, learned
            code = 0
            try:
                cli.main(["train", *options])
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                import traceback
                traceback.print_exc()
                code = 99
            os._exit(code)
        os.close(writing)
        for (marks, seconds), number in zip(waits, sent):
            for mark in marks:
                while os.read(reading, 1) not in (mark.encode(), b""):
                    pass
            time.sleep(seconds + 0.01)
            os.kill(child, number)
        began = time.monotonic()
        os.set_blocking(reading, False)
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            try:
                os.read(reading, 4096)
            except BlockingIOError:
                pass
            time.sleep(0.002)
        os.close(reading)
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        print(json.dumps([name, code, time.monotonic() - began]), flush=True)
"""
SMALL = ("network.width=32", "network.layers=1", "network.heads=2", "network.length=32", "batch_size=8")


@dataclass(frozen=True)
class Life:
    """One `esolm train`, and what it is sent: after marks (h: it listens, l: a step begins) and seconds, a signal."""

    folder: Path
    name: str
    waits: tuple[tuple[str, float], ...] = (("h", 0.0),)
    sent: tuple[int, ...] = (signal.SIGTERM,)
    settings: tuple[str, ...] = ()
    resume: bool = False

    @property
    def out(self) -> Path:
        return self.folder / self.name

    def plan(self) -> tuple:
        options = ["--out", str(self.out)]
        if self.resume:
            options += ["--resume"]
        else:
            options += ["--recipe", "demo", "--data", str(self.folder / "text.txt"), "--vocab-size", "258", "--set"]
            options += [*SMALL, "dtype=float32", "log_every=1", *self.settings]
        return self.name, options, self.waits, self.sent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(
        "\f".join("the quick brown fox jumps over the lazy dog; " * 40 for _ in range(60))
    )
    return tmp_path


def live(folder: Path, lives: list[Life]) -> list[tuple[int, float]]:
    """The exit code of each life, and the seconds from its last signal to its end."""
    plan = json.dumps([life.plan() for life in lives])
    done = subprocess.run(
        [sys.executable, "-c", NURSERY, str(folder), plan], stdout=subprocess.PIPE, text=True, check=True
    )
    for life in lives:
        assert "Traceback" not in (told := (folder / f"{life.name}.err").read_text()), told
    return [(code, seconds) for _, code, seconds in map(json.loads, done.stdout.splitlines())]


def is_right(life: Life, code: int) -> bool:
    """Saved where training had begun, with nothing lost of what it had told; else the code of a signal."""
    entries = journal.read(life.out) if (life.out / journal.FILE).exists() else []
    if not any(entry.get("event") == "began" for entry in entries):
        return code == (INTERRUPTED if life.sent[0] == signal.SIGINT else TERMINATED)
    steps = max((entry["step"] for entry in entries), default=0)
    saved = checkpoint.load(life.out, warn=lambda message: pytest.fail(message))
    return code == SAVED and saved.step == steps and entries[-1].get("event") == "interrupted"


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def test_a_signal_while_the_text_is_read_ends_with_its_code_and_in_training_saves(folder):
    lives = [Life(folder, f"reading-{n}", (("h", 0.0),), (n,)) for n in SIGNALS]
    lives += [Life(folder, f"training-{n}", (("lll", 0.0),), (n,), ("num_steps=1000000",)) for n in SIGNALS]
    found = live(folder, lives)
    assert [code for code, _ in found] == [143, 130, 143, 75, 75, 75]
    assert all(is_right(life, code) for life, (code, _) in zip(lives, found, strict=True))
    assert max(seconds for _, seconds in found) < PATIENCE
    told = (folder / f"training-{signal.SIGTERM}.err").read_text()
    assert "go on with: esolm train --resume --out" in told


def test_validation_and_sampling_are_cut_short_and_a_second_interrupt_ends_at_once(folder):
    endless = ("num_steps=1000000", "validate_every=1", "sample_every=1", "sample_texts=2000", "network.length=256")
    long_steps = ("num_steps=1000000", "batch_size=2048", "network.width=128", "network.length=256")
    lives = [
        Life(folder, "writing", (("l", 3.0),), (signal.SIGTERM,), endless),  # two steps' samples would take minutes
        Life(folder, "twice", (("l", 0.3), ("", 0.3)), (signal.SIGINT, signal.SIGINT), long_steps),
    ]
    (written, seconds), (twice, at_once) = live(folder, lives)
    assert written == SAVED and is_right(lives[0], written) and seconds < PATIENCE
    assert twice == INTERRUPTED and at_once < 5
    assert (folder / "twice.err").read_text().endswith("esolm: interrupted\n")


DROPPED = """if True:
    import os, signal, time
    from esolm import signals
    signal.signal(signal.SIGINT, signal.default_int_handler)
    class Stopped:
        def __del__(self):
            os.kill(os.getpid(), NUMBER)  # what its handler raises here, Python drops
            time.sleep(0.01)
    with signals.leaving():
        try:
            Stopped()
            for _ in range(100):
                time.sleep(0.1)
        except (KeyboardInterrupt, signals.Terminated) as error:
            print(type(error).__name__)
            time.sleep(0.5)  # a second interrupt would have ended the process
            print("whole")
"""


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Terminated")])
def test_a_signal_that_arrives_in_a_destructor_is_not_lost(number, name):
    code = DROPPED.replace("NUMBER", str(int(number)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{name}\nwhole\n", "")


LONG_CALL = """if True:
    import hashlib, signal
    from esolm import signals
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts behind ignore it
    with signals.leaving():
        print("in", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in which Python runs no handler
"""


def test_a_second_interrupt_ends_a_process_in_the_midst_of_a_long_call():
    with subprocess.Popen([sys.executable, "-c", LONG_CALL], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"in\n"
        for _ in range(2):
            time.sleep(0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
        try:
            assert process.wait(PATIENCE) == INTERRUPTED
        finally:
            process.kill()


def test_a_run_that_was_stopped_goes_on_to_its_end(folder):
    stopped = Life(folder, "run", (("lll", 0.0),), (signal.SIGUSR1,), ("num_steps=40",))
    assert [code for code, _ in live(folder, [stopped, Life(folder, "run", (), (), resume=True)])] == [SAVED, 0]
    steps = [entry["step"] for entry in journal.read(folder / "run") if "loss" in entry]
    assert steps == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_signals_at_random_moments(folder):
    chance = random.Random()
    often = ("num_steps=1000000", "validate_every=7", "validation_texts=64", "save_every=5", "sample_every=11")
    lives = [
        Life(folder, f"life-{n}", ((mark, chance.uniform(0, 3)),), (chance.choice(SIGNALS),), often)
        for n, mark in enumerate("l" * 100 + "h" * 30)
    ]
    found = live(folder, lives)
    wrong = [(life.name, life.sent, end) for life, end in zip(lives, found, strict=True) if not is_right(life, end[0])]
    assert wrong == []
    codes, seconds = [code for code, _ in found], sorted(seconds for _, seconds in found)
    assert codes[:100] == [SAVED] * 100
    print(f"100 of 100 in training saved and ended with 75, median {seconds[65]:.2f} s, at most {seconds[-1]:.2f} s")
    counts = ", ".join(f"{codes[100:].count(code)} with {code}" for code in (SAVED, INTERRUPTED, TERMINATED))
    print(f"30 of 30 from the first moment on as they should: {counts}")
    assert seconds[-1] < PATIENCE
