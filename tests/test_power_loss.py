"""Power that fails at any moment of a save: what was not synced is dropped, truncated or zeroed; old or new loads.

The operations of a save are recorded and done again in a model of a disk, which knows for every folder the entries and
for every file the bytes that were synced. From each prefix every state is rebuilt that the rules allow: each folder's
entries as they were at its last sync, or as they are; each unsynced file empty, cut in half, zeroed or whole.
"""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from esolm import checkpoint, parts, seal
from test_checkpoint import assert_loads, of_step


@dataclass(eq=False)
class File:
    data: bytes
    synced: bytes | None = None  # None: not one byte of it need be on disk


@dataclass(eq=False)
class Folder:
    entries: dict[str, "File | Folder"] = field(default_factory=dict)
    synced: dict[str, "File | Folder"] = field(default_factory=dict)


class Disk:
    """What lies below one folder, and what of it would outlive the power."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = Folder()

    def parent(self, path: Path) -> Folder:
        place: Folder = self.top
        for part in path.relative_to(self.root).parts[:-1]:
            place = place.entries[part]
        return place

    def at(self, path: Path) -> File | Folder:
        return self.top if path == self.root else self.parent(path).entries[path.name]

    def do(self, operation: tuple) -> None:
        kind, path, *rest = operation
        if kind == "mkdir":
            self.parent(path).entries[path.name] = Folder()
        elif kind == "write":
            self.parent(path).entries[path.name] = File(rest[0])
        elif kind == "rename":
            self.parent(rest[0]).entries[rest[0].name] = self.parent(path).entries.pop(path.name)
        elif kind == "remove":
            del self.parent(path).entries[path.name]
        elif isinstance(place := self.at(path), File):
            place.synced = place.data
        else:
            place.synced = dict(place.entries)

    def folders(self) -> list[Folder]:
        """Those whose entries differ from what was synced, wherever they can still be reached."""
        found, waiting = [], [self.top]
        while waiting:
            folder = waiting.pop()
            if folder not in found:
                found.append(folder)
                inside = [*folder.entries.values(), *folder.synced.values()]
                waiting += [entry for entry in inside if isinstance(entry, Folder)]
        return [folder for folder in found if folder.entries != folder.synced]

    def build(self, target: Path, lost: list[Folder], spoil: str) -> None:
        self._build(self.top, target, lost, spoil)

    def _build(self, folder: Folder, target: Path, lost: list[Folder], spoil: str) -> None:
        target.mkdir()
        for name, entry in (folder.synced if folder in lost else folder.entries).items():
            if isinstance(entry, Folder):
                self._build(entry, target / name, lost, spoil)
            else:
                whole = entry.synced == entry.data or spoil == "whole"
                (target / name).write_bytes(entry.data if whole else SPOILT[spoil](entry.data))


SPOILT = {
    "dropped": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: bytes(len(data)),
    "whole": lambda data: data,
}


def recorded(patch: pytest.MonkeyPatch, folder: Path, save) -> list[tuple]:
    """The operations below a folder that a save does; ("told",) where it returns."""
    done: list[tuple] = []

    def note(owner: object, name: str, tell) -> None:
        original = getattr(owner, name)

        def noted(*arguments, **options):
            before = list(tell(*arguments)) if name == "rmtree" else []
            found = original(*arguments, **options)
            done.extend(before or (tell(*arguments) if name != "rmtree" else []))
            return found

        patch.setattr(owner, name, noted)

    def written(path: Path) -> list[tuple]:
        return [("write", path, path.read_bytes())]

    def removed(path: Path) -> Iterator[tuple]:
        for inner in sorted(path.rglob("*"), reverse=True):
            yield "remove", inner
        if path.exists():
            yield "remove", path

    note(Path, "mkdir", lambda path, *_: [("mkdir", path)])
    note(Path, "write_bytes", lambda path, data: written(path))
    note(parts, "save_file", lambda tensors, path: written(path))
    note(Path, "rename", lambda path, target: [("rename", path, Path(target))])
    note(shutil, "rmtree", removed)
    note(seal, "sync", lambda path: [("sync", path)])
    save()
    made: set[Path] = {folder}
    return [o for o in done if not (o[0] == "mkdir" and (o[1] in made or made.add(o[1])))]  # exist_ok


def before(folder: Path, steps: tuple[int, ...]) -> Disk:
    """A run's folder with some steps, all of it on disk."""
    for step in steps:
        checkpoint.save(folder, of_step(step), keep=9)
    disk = Disk(folder)
    for path in sorted(folder.rglob("*")):
        disk.do(("mkdir", path) if path.is_dir() else ("write", path, path.read_bytes()))
    for path in [*folder.rglob("*"), folder]:
        disk.do(("sync", path))
    return disk


def lose_power(tmp_path: Path, steps: tuple[int, ...], every: int = 1) -> tuple[int, dict[int, int]]:
    """Every state after every prefix of saving step 2 with keep=1: how many, and how many load with which step."""
    folder, count, loaded = tmp_path / "run", 0, {2: 0, **dict.fromkeys(steps, 0)}
    disk = before(folder, steps)
    with pytest.MonkeyPatch.context() as patch:
        operations = recorded(patch, folder, lambda: checkpoint.save(folder, of_step(2), keep=1))
    published = max(n for n, o in enumerate(operations) if o == ("sync", folder))
    for number, operation in enumerate(operations):
        disk.do(operation)
        if number % every:
            continue
        changed = disk.folders()
        choices = itertools.chain.from_iterable(itertools.combinations(changed, n) for n in range(len(changed) + 1))
        for lost, spoil in itertools.product(list(choices), SPOILT):
            count += 1
            target = tmp_path / "found"
            disk.build(target, list(lost), spoil)
            step = checkpoint.load(target, warn=lambda _: None).step
            assert_loads(target, step)
            assert step == 2 or (step in steps and number < published), f"step {step} after {operation}"
            loaded[step] += 1
            shutil.rmtree(target)
    replayed = tmp_path / "replayed"
    disk.build(replayed, [], "whole")
    assert contents(replayed) == contents(folder)  # nothing that a save does was left unrecorded
    return count, loaded


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("steps", [(1,), (2,)], ids=["a new step", "a step there is"])
def test_when_power_fails_during_a_save_the_old_step_loads_or_the_new_one(tmp_path, steps):
    count, loaded = lose_power(tmp_path, steps, every=7)
    assert count > 40 and all(loaded.values())


@pytest.mark.parametrize("left_out", ["files", "folders"])
def test_without_its_syncs_a_save_does_not_survive(tmp_path, monkeypatch, left_out):
    """The check can fail: leave out either kind, and some state is damaged or a step that was told of is lost."""
    sync = seal.sync
    wanted = Path.is_dir if left_out == "files" else Path.is_file
    monkeypatch.setattr(seal, "sync", lambda path: sync(path) if wanted(path) else None)
    noted = recorded

    def honestly(patch, folder, save):
        return [o for o in noted(patch, folder, save) if o[0] != "sync" or wanted(o[1])] + [("sync", folder)]

    monkeypatch.setattr("test_power_loss.recorded", honestly)
    with pytest.raises((AssertionError, checkpoint.CheckpointError)):
        lose_power(tmp_path, (1,), every=4)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(1,), (1, 2), (2,)], ids=str)
def test_every_prefix_of_a_save_loads_old_or_new_when_power_fails(tmp_path, steps):
    count, loaded = lose_power(tmp_path, steps)
    print(f"saving step 2 beside {steps}: {count} states of the disk, loaded as {loaded}")
