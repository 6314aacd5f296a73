"""SIGKILL, a full disk and a broken disk at every system call of a save that prunes: the old step loads or the new one.

strace stops a forked process at its k-th call, for every k, so that no moment is left out.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Saves step 2 (beside step 1, which is pruned; beside steps 1 and 2; over a step 2), again and again, each time in a
# fork with a fault at the k-th call of one kind, until the fault comes too late; so for each kind (strace counts each).
NURSERY = """if True:
    import json, os, re, shutil, signal, subprocess, sys
    from pathlib import Path
    import torch
    from test_checkpoint import of_step
    from esolm import checkpoint

    torch.set_num_threads(1)
    root, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
    log, found = root / "strace.log", {"points": 0, "old": 0, "new": 0, "wrong": [], "calls": {}}

    def prepared(before):
        folder = root / "run"
        shutil.rmtree(folder, ignore_errors=True)
        for step in before:
            checkpoint.save(folder, of_step(step, state={"try": 1}), keep=9)
        return folder

    def save(folder):
        os.kill(os.getpid(), signal.SIGSTOP)
        try:
            checkpoint.save(folder, of_step(2, state={"try": 2}), keep=1, warn=lambda words: None)
        except checkpoint.SaveError:
            os._exit(3)
        os._exit(0)

    def traced(folder, *how):
        # The exit status of a save under strace with these options, and the calls that it saw.
        child = os.fork()
        if not child:
            save(folder)
        os.waitpid(child, os.WUNTRACED)
        tracer = subprocess.Popen(["strace", "-o", log, *how, "-p", str(child)], stderr=subprocess.PIPE)
        tracer.stderr.readline()  # attached
        os.kill(child, signal.SIGCONT)
        status = os.waitpid(child, 0)[1]
        tracer.wait()
        return status, [line for line in log.read_text().splitlines() if re.match("[a-z0-9_]+\\(", line)]

    def attempt(folder, call, fault, number):
        # The exit status with a fault at the `number`-th such call, and whether there were so many.
        status, lines = traced(folder, "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={number}")
        return status, os.WIFSIGNALED(status) or any("INJECTED" in line for line in lines)

    def kinds(before, calls):
        return {line.partition("(")[0] for line in traced(prepared(before), "-e", f"trace={calls}")[1]}

    for before, call, fault in [(b, call, f) for b, calls, f in plan for call in sorted(kinds(b, calls))]:
        number = 0
        while True:
            number += 1
            folder = prepared(before)
            status, hit = attempt(folder, call, fault, number)
            where = f"{fault} at {call} number {number}, before {before}"
            try:
                at = checkpoint.load(folder, warn=lambda words: None)
                new = at.step == 2 and at.state == {"try": 2}
                expected = of_step(at.step, state=at.state)
                for kind in ("model", "ema", "optim"):
                    for name, tensor in getattr(expected, kind).items():
                        assert torch.equal(tensor, getattr(at, kind)[name]), name
                assert at.step in (*before, 2)
                if not new and status == 0:
                    found["wrong"].append(f"ended with 0 without the new step: {where}")
                checkpoint.save(folder, of_step(5), keep=1)
                left = sorted(path.name for path in folder.iterdir())
                if left != ["step-000000005"]:
                    found["wrong"].append(f"{left} left after the next save: {where}")
            except (checkpoint.CheckpointError, AssertionError) as problem:
                found["wrong"].append(f"{problem}: {where}")
                new = False
            if not hit:
                if status != 0 or not new:
                    found["wrong"].append(f"an undisturbed save ended with {status}: {where}")
                break
            found["points"] += 1
            found["new" if new else "old"] += 1
            found["calls"][call] = found["calls"].get(call, 0) + 1
    print(json.dumps(found))
"""
WRITING = "mkdir,write,fsync,rename,renameat,unlinkat,rmdir,ftruncate,chmod"
SCENES: tuple[tuple[int, ...], ...] = ((1,), (1, 2), (2,))
KILL, FULL, BROKEN = "signal=KILL", "error=ENOSPC", "error=EIO"


def _can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        traced = ["strace", "-o", Path(folder) / "log", "true"]
        return subprocess.run(traced, capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not _can_trace(), reason="strace is not there, or may not trace")


def crashed(folder: Path, plan: list[tuple[tuple[int, ...], str, str]]) -> dict:
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", NURSERY, str(folder), json.dumps(plan)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    assert done.returncode == 0, done.stderr
    found: dict = json.loads(done.stdout)
    return found


def test_at_every_call_that_writes_a_kill_costs_the_new_step_at_most(tmp_path):
    found = crashed(tmp_path, [((1,), WRITING, KILL)])
    assert found["wrong"] == []
    assert found["old"] > 20 and found["new"] > 5
    assert {"mkdir", "write", "fsync", "rename", "unlinkat", "rmdir"} <= found["calls"].keys()


def test_a_disk_that_is_full_or_broken_at_a_call_costs_the_new_step_at_most_and_is_told(tmp_path):
    found = crashed(tmp_path, [((1,), "write,rename", FULL), ((1,), "fsync", BROKEN)])
    assert found["wrong"] == [] and found["points"] > 15


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_at_every_system_call_a_kill_and_at_every_writing_one_a_full_and_a_broken_disk(tmp_path):
    plan = [(scene, "all", KILL) for scene in SCENES]
    faults = [(scene, f"{WRITING},openat,close", fault) for scene in SCENES for fault in (FULL, BROKEN)]
    for kind, part in (("SIGKILL at every system call", plan), ("ENOSPC and EIO at each call that writes", faults)):
        found = crashed(tmp_path, part)
        calls = ", ".join(f"{count} {call}" for call, count in sorted(found["calls"].items()))
        print(f"{kind}: {found['points']} points ({calls}): {found['old']} old, {found['new']} new, 0 other")
        assert found["wrong"] == []
