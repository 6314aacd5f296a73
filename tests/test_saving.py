"""Saving while training goes on: what is told is on disk, training waits for the copy only, failures come to light."""

import threading
import time
from pathlib import Path

import pytest
import torch

from esolm import checkpoint, memory
from esolm import saving as module
from esolm.checkpoint import SaveError
from esolm.saving import Saving
from test_checkpoint import assert_loads, names, of_step


class Told:
    """What a run was told, and that each step told of was on disk at that moment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines = folder, []

    def __call__(self, name: str, text: str) -> None:
        self.lines.append((name, text))
        if name == "saved":
            checkpoint.verify(self.folder / text)

    @property
    def saved(self) -> list[str]:
        return [text for name, text in self.lines if name == "saved"]

    @property
    def warnings(self) -> list[str]:
        return [text for name, text in self.lines if name == "warning"]


class Disk:
    """`checkpoint.save` as the test wants it: held up until `go`, or failing."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.go, self.begun, self.problem, self.at_once = threading.Event(), [], None, 0
        self._save, self._inside = checkpoint.save, 0
        patch.setattr(module.checkpoint, "save", self.save)

    def save(self, folder: Path, state: checkpoint.Checkpoint, **options: object) -> Path:
        self.begun.append(state.step)
        self._inside += 1
        self.at_once = max(self.at_once, self._inside)
        assert self.go.wait(60)
        self._inside -= 1
        if self.problem is not None:
            raise self.problem
        return self._save(folder, state, **options)


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def until(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("nothing happened for a minute")


def test_a_state_that_changes_while_it_is_written_is_saved_as_it_was(tmp_path, told, disk):
    with Saving(tmp_path, 1, 9, told) as saving:
        for step in (1, 2):
            state = of_step(step)
            disk.go.clear()
            saving.begin(state)
            for group in (state.model, state.ema, state.optim):
                for tensor in group.values():
                    tensor.fill_(-7)
            disk.go.set()
    for step in (1, 2):
        assert_loads(tmp_path / f"step-{step:09d}", step)
    assert told.saved == ["step-000000001", "step-000000002"]


def test_training_does_not_wait_for_the_write_and_a_step_is_told_only_when_it_is_on_disk(tmp_path, told, disk):
    with Saving(tmp_path, 1, 9, told) as saving:
        saving.begin(of_step(1))
        until(lambda: disk.begun == [1])
        for _ in range(5):
            saving.look()
        assert told.lines == [] and names(tmp_path) == []
        disk.go.set()
        until(lambda: saving.look() or told.lines)
        assert told.lines == [("saved", "step-000000001")]


def test_one_write_is_in_flight_and_the_next_waits_for_it(tmp_path, told, disk):
    with Saving(tmp_path, 1, 9, told) as saving:
        saving.begin(of_step(1))
        threading.Timer(0.3, disk.go.set).start()
        began = time.monotonic()
        saving.begin(of_step(2))
        assert time.monotonic() - began > 0.25
        assert told.saved[:1] == ["step-000000001"]
        saving.begin(of_step(3))
    assert disk.begun == [1, 2, 3] and disk.at_once == 1
    assert told.saved == [f"step-{step:09d}" for step in (1, 2, 3)]


def test_a_write_that_fails_is_told_tried_again_soon_and_then_no_more(tmp_path, told, disk):
    disk.go.set()
    disk.problem = SaveError(tmp_path, "could not save: full")
    with Saving(tmp_path, 100, 9, told) as saving:
        assert [step for step in range(1, 201) if saving.due(step)] == [100, 200]
        saving.begin(of_step(100))
        until(lambda: saving.look() or told.lines)
        assert told.lines == [("warning", "could not save: full; training goes on and tries again")]
        assert [step for step in range(101, 200) if saving.due(step)] == list(range(110, 200, 10))
        disk.problem = None
        saving.begin(of_step(110))
        until(lambda: saving.look() or told.saved)
        assert [step for step in range(111, 201) if saving.due(step)] == [200]


def test_a_last_save_that_fails_is_an_error_and_one_before_it_a_warning(tmp_path, told, disk):
    disk.go.set()
    disk.problem = SaveError(tmp_path, "could not save: full")
    saving = Saving(tmp_path, 1, 9, told)
    with pytest.raises(SaveError, match="could not save: full"), saving:
        saving.begin(of_step(1))
        saving.finish(of_step(2))
    assert len(told.warnings) == 1 and not told.saved


def test_an_error_that_is_not_the_disks_ends_the_run(tmp_path, told, disk):
    disk.go.set()
    disk.problem = ValueError("not plain data")
    with pytest.raises(ValueError, match="not plain data"), Saving(tmp_path, 1, 9, told) as saving:
        saving.begin(of_step(1))


def test_a_run_that_ends_in_an_error_waits_for_its_write_and_tells_of_it(tmp_path, told, disk):
    threading.Timer(0.2, disk.go.set).start()
    with pytest.raises(ArithmeticError, match="diverged"), Saving(tmp_path, 1, 9, told) as saving:
        saving.begin(of_step(1))
        raise ArithmeticError("diverged")
    assert told.saved == ["step-000000001"]


def test_a_second_interrupt_does_not_wait(tmp_path, told, disk):
    with pytest.raises(KeyboardInterrupt), Saving(tmp_path, 1, 9, told) as saving:
        saving.begin(of_step(1))
        raise KeyboardInterrupt
    assert told.lines == []
    disk.go.set()
    saving._wait()


def test_a_state_that_must_not_be_saved_is_told_and_tried_again(tmp_path, told):
    with Saving(tmp_path, 100, 9, told) as saving:
        saving.refuse("the weight x is NaN")
        assert saving.due(110)
    assert told.warnings == ["not saved: the weight x is NaN; the checkpoints from before are kept"]


def test_where_there_is_no_room_for_a_copy_training_waits_for_the_write(tmp_path, told, disk, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 100)
    disk.go.set()
    with Saving(tmp_path, 1, 9, told) as saving:
        saving.begin(of_step(1))
        assert told.saved == ["step-000000001"] and not saving.forget()


def test_where_there_is_no_room_for_a_thread_training_waits_for_the_write(tmp_path, told, disk, monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    disk.go.set()
    with Saving(tmp_path, 1, 9, told) as saving:
        saving.begin(of_step(1))
        assert told.saved == ["step-000000001"]
        saving.begin(of_step(2))
    assert told.saved == ["step-000000001", "step-000000002"]


def test_copies_that_are_too_much_are_freed_once_written_and_made_no_more(tmp_path, told, disk):
    with Saving(tmp_path, 1, 9, told) as saving:
        saving.begin(of_step(1))
        threading.Timer(0.2, disk.go.set).start()
        assert saving.forget() and not saving.forget()
        saving.begin(of_step(2))
        assert told.saved == ["step-000000001", "step-000000002"]
    assert_loads(tmp_path, 2)


def test_what_could_not_be_pruned_is_told(tmp_path, told, monkeypatch):
    monkeypatch.setattr(checkpoint, "_prune", lambda *_: (_ for _ in ()).throw(OSError(5, "broken")))
    with Saving(tmp_path, 1, 1, told) as saving:
        saving.begin(of_step(1))
    assert told.saved == ["step-000000001"] and "could not be removed" in told.warnings[0]


def stall(folder: Path, megabytes: int, saves: int) -> dict[str, list[float]]:
    """Seconds that training waits for saves, that a copy takes, and that a whole write takes, the same state."""
    parts = {name: torch.randn(megabytes * 2**20 // 16) for name in "abcd"}
    state = of_step(0, model={"a": parts["a"]}, ema={"a": parts["b"]}, optim={"a": parts["c"], "b": parts["d"]})
    found: dict[str, list[float]] = {"first": [], "save": [], "copy": [], "write": []}
    room = {name: torch.zeros_like(tensor) for name, tensor in parts.items()}

    def timed(kind: str, call) -> None:
        began = time.perf_counter()
        call()
        found[kind].append(time.perf_counter() - began)

    with Saving(folder, 1, 1, lambda *_: None) as saving:
        for number in range(saves + 1):
            timed("save" if number else "first", lambda: saving.begin(state))
            saving._wait()
            timed("copy", lambda: [room[name].copy_(tensor) for name, tensor in parts.items()])
            timed("write", lambda: checkpoint.save(folder, state, keep=1))
    return {kind: sorted(times) for kind, times in found.items()}


def test_training_waits_for_the_copy_and_not_for_the_write(tmp_path):
    times = stall(tmp_path, 64, 5)
    assert times["save"][0] < 2 * times["copy"][-1] + 0.05  # of five tries on a machine that may be busy, the best
    assert times["save"][0] < times["write"][0] / 2


@pytest.mark.slow
def test_training_waits_for_the_copy_of_a_state_of_a_gigabyte(tmp_path):
    times = stall(tmp_path, 1024, 5)
    middle = {kind: found[len(found) // 2] for kind, found in times.items()}
    print(", ".join(f"{kind} {seconds:.3f} s" for kind, seconds in middle.items()), "(medians of 5; 1 GiB)")
    assert middle["save"] < 2 * middle["copy"] + 0.1 < middle["write"]


@pytest.mark.slow
def test_a_step_is_little_slower_while_a_checkpoint_is_written(tmp_path):
    """Hashing, writing and syncing let go of the interpreter; what is left is the memory and the cores they share."""
    matrix, big = torch.randn(512, 512), {"x": torch.randn(2**27)}
    alone: list[float] = []
    beside: list[float] = []

    def step(times: list[float]) -> None:
        began = time.perf_counter()
        for _ in range(8):
            matrix @ matrix
        times.append(time.perf_counter() - began)

    with Saving(tmp_path, 1, 1, lambda *_: None) as saving:
        for number in range(3):
            for _ in range(200):
                step(alone)
            saving.begin(of_step(number, model=big, ema=None, optim={}))
            while saving._thread is not None and saving._thread.is_alive():
                step(beside)
    middle = [sorted(times)[len(times) // 2] for times in (alone, beside)]
    print(f"a step of {1e3 * middle[0]:.1f} ms takes {1e3 * middle[1]:.1f} ms while 512 MiB are written")
    assert middle[1] < 3 * middle[0]
