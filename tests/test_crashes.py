"""Saves that fail or die on the way: whenever it happens, what was saved before still loads."""

import errno
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from esolm import parts, seal
from esolm.checkpoint import SaveError, load, save
from test_checkpoint import assert_loads, names, of_step

WRITES: list[tuple[object, str]] = [
    (parts, "save_file"),
    (Path, "mkdir"),
    (Path, "write_bytes"),
    (Path, "rename"),
    (Path, "chmod"),
    (seal, "sync"),
]


def failing_after(patch: pytest.MonkeyPatch, owner: object, name: str, calls: int) -> list[object]:
    """Let a call of `owner.name` find the disk full after so many that do not."""
    done: list[object] = []
    original: Callable = getattr(owner, name)

    def fail(*arguments: object, **options: object) -> object:
        done.append(arguments)
        if len(done) == calls + 1:
            raise OSError(errno.ENOSPC, "full")
        return original(*arguments, **options)

    patch.setattr(owner, name, fail)
    return done


@pytest.mark.parametrize("owner_name", WRITES, ids=lambda part: part[1])
@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "a step there is"])
def test_a_disk_that_is_full_at_any_call_costs_nothing_that_was_saved(tmp_path, owner_name, step):
    owner, name = owner_name
    for calls in range(50):
        folder = tmp_path / str(calls)
        save(folder, of_step(1))
        with pytest.MonkeyPatch.context() as patch:
            made = failing_after(patch, owner, name, calls)
            try:
                save(folder, of_step(step))
            except SaveError as problem:
                assert re.search(r"could not save .*step-\d+: No space left on device; it needs 0\.0 MB", str(problem))
                assert problem.path == folder / f"step-{step:09d}"
            else:
                assert len(made) <= calls  # every call there is has failed once
                break
        assert load(folder, warn=lambda message: pytest.fail(str(message))).step in (1, step)
        assert not [left for left in names(folder) if left.startswith(".saving")]
        save(folder, of_step(5))
        assert_loads(folder, 5)
        assert not [left for left in names(folder) if left.startswith(".")]
    assert 0 < calls < 49


def test_a_disk_that_is_full_indeed_is_told_with_what_is_needed(tmp_path):
    """The kernel refuses to let a child's file grow beyond 100 kB."""
    code = """if True:
        import resource, sys, torch
        from pathlib import Path
        from esolm.checkpoint import Checkpoint, save
        folder = Path(sys.argv[1])
        for size in (10, 10**6):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            save(folder, Checkpoint(step=size, model={"x": torch.ones(size)}, config={}, tokenizer_json="{}"))
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "SaveError: could not save " in done.stderr and "File too large; it needs 4.0 MB" in done.stderr
    assert names(tmp_path) == ["step-000000010"]
    assert load(tmp_path).step == 10


def test_a_folder_that_may_not_be_written_is_told(tmp_path):
    """Root may write everywhere, so that a user without rights tries."""
    code = """if True:
        import os, torch
        from pathlib import Path
        from esolm.checkpoint import Checkpoint, load, save
        os.getuid() or os.setuid(65534)
        found = load(Path("run"))
        save(Path("run"), Checkpoint(step=2, model=found.model, config={}, tokenizer_json="{}"))
    """
    folder = tmp_path / "run"
    save(folder, of_step(1))
    tmp_path.chmod(0o755)
    folder.chmod(0o555)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    folder.chmod(0o755)
    told = "SaveError: could not save run/step-000000002: Permission denied; make it writable or choose another folder"
    assert done.returncode == 1 and told in done.stderr
    assert_loads(folder, 1)


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(SaveError, match=r"could not save .*: (File exists|Not a directory); choose another folder"):
        save(tmp_path / "run", of_step(1))
    assert (tmp_path / "run").read_text() == "mine"


NURSERY = """if True:
    import os, random, signal, sys, time, torch
    from pathlib import Path
    from esolm.checkpoint import Checkpoint, load, save

    folder, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))

    def of_step(step, number):
        weights = torch.full((40_000,), float(number))
        return Checkpoint(step=step, model={"x": weights}, optim={"x": weights + 1}, ema={"x": weights + 2}, config={},
                          tokenizer_json="{}", state={"number": number})

    def save_without_end(number):
        while True:
            number += 1
            save(folder, of_step(number // 2, number), keep=2)  # every step twice, so that one is replaced

    save(folder, of_step(0, 0))
    began = time.monotonic()
    save(folder, of_step(0, 0))
    one_save = time.monotonic() - began
    seen, partial = 0, 0
    for kill in range(kills):
        child = os.fork()
        if not child:
            save_without_end(seen)
        time.sleep(chance.uniform(0, 5 * one_save))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        partial += any(path.name.startswith(".") for path in folder.iterdir())
        found = load(folder, warn=lambda message: sys.exit(f"after kill {kill}: {message}"))
        number = found.state["number"]
        assert number >= seen and found.step == number // 2, (number, seen)
        for offset, tensors in enumerate((found.model, found.optim, found.ema)):
            assert (tensors["x"] == number + offset).all()
        seen = number
    print(seen, partial)
"""


def survive(folder: Path, kills: int, seed: int) -> tuple[int, int]:
    """Kill a child that saves without end, again and again; how many saves there were, and kills in mid-save."""
    command = [sys.executable, "-c", NURSERY, str(folder), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    saves, partial = map(int, done.stdout.split())
    return saves, partial


def test_a_run_that_is_killed_while_it_saves_loads_with_its_newest_step(tmp_path):
    saves, partial = survive(tmp_path, 40, 0)
    assert saves > 3 and partial > 3  # a machine may be busy with others


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_is_killed_hundreds_of_times_while_it_saves_loads_each_time(tmp_path):
    saves, partial = survive(tmp_path, 400, random.randrange(2**32))
    assert saves > 40 and partial > 40
