"""Checkpoints that survive: written whole or not at all, checked byte for byte before anything is parsed.

    step-000001000/
        model.safetensors             the weights
        ema.safetensors               the averaged weights (optional)
        optim/shard-00000.safetensors the optimizer's state (absent in what is shared), a shard a rank (parts.py)
        config.json tokenizer.json state.json
        manifest.json                 format version; size and sha256 of each file; its own digest last

A save writes a hidden folder beside the target, syncs every file and folder, renames, syncs the parent and
only then prunes older steps. A load reads the manifest first, refuses every name it does not know, compares
sizes, then digests, then the headers of the tensors, and only then parses (seal.py). No pickle anywhere.
It builds no models (model.py) and locks no folder against a second run.
"""

import errno
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from esolm import parts, plain, seal
from esolm.hub import HubError, is_name, located
from esolm.ranks import ALONE, Ranks
from esolm.shipped import MODELS

Warn = Callable[[str], object]


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete, damaged or not ours. The message names the file and what to do."""


class SaveError(OSError):
    """A checkpoint could not be written; those already there are untouched. Names the path and a remedy."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """All that a run needs to go on, or, with `optim` and `state` left empty, all that a reader needs.

    `state["validation"]`, where there is one, is what the model costs on text held out: the lowest is `best`.
    """

    step: int
    model: dict[str, Tensor]
    config: dict[str, Any]
    tokenizer_json: str
    ema: dict[str, Tensor] | None = None
    optim: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.step, bool) or not isinstance(self.step, int) or not 0 <= self.step < 10**12:
            raise ValueError(f"step must be an integer in [0, 10^12), got {self.step!r}")
        if not self.model:
            raise ValueError("model must hold at least one tensor, got none")

    def for_readers(self) -> "Checkpoint":
        """What writing and scoring need and no more: the averaged weights where there are any."""
        state = {key: value for key, value in self.state.items() if key in _READ}
        return replace(self, model=self.ema or self.model, ema=None, optim={}, state=state)

    def rounded(self) -> "Checkpoint":
        """The same in half the bytes: weights in bfloat16."""
        saved = self.for_readers()
        return replace(saved, model={name: tensor.bfloat16() for name, tensor in saved.model.items()})


def save(
    folder: Path, checkpoint: Checkpoint, *, keep: int | None = 3, warn: Warn = warnings.warn, ranks: Ranks = ALONE
) -> Path:
    """Write `folder/step-<step>` and return its path once it is safely on disk.

    Afterwards the newest `keep` steps remain (None: all), and the `best` of those there were. Steps beyond this
    one, of a run since resumed from here, are set aside as `abandoned-step-...`. Raises SaveError when the disk
    is full or refuses, with everything saved before still there, and ValueError when `config` or `state` is not
    plain data or something else could be written but not loaded.

    Of several `ranks` all call this, in a folder that they share: each writes the part of the optimizer's state that
    its checkpoint has, rank 0 the rest. What fails on one fails on all, and then nothing is renamed.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1 (or None to keep all), got {keep}")
    texts = {
        "config.json": plain.render(checkpoint.config),
        "tokenizer.json": checkpoint.tokenizer_json,
        "state.json": plain.render(checkpoint.state if ranks.alone else {**checkpoint.state, "ranks": ranks.size}),
    }
    folder = Path(folder)
    target = folder / f"step-{checkpoint.step:09d}"
    temporary = folder / f".saving-{target.name}-{int(ranks.gather([os.getpid()])[0][0])}"
    try:
        with _told_as_save_error(target, checkpoint):
            with ranks.together():
                if ranks.leads:
                    _make_folder(folder)
                    _recover(folder)
                    _write(temporary, checkpoint, texts)
            with ranks.together():
                if not ranks.leads:
                    _write_shard(temporary, checkpoint, ranks.rank)
            with ranks.together():
                if ranks.leads:
                    _seal(temporary, checkpoint, ranks.size)
                    _refuse_unreadable(temporary)
                    _publish(temporary, target)
    finally:
        if ranks.leads:
            shutil.rmtree(temporary, ignore_errors=True)
    try:
        if ranks.leads:
            _prune(folder, checkpoint.step, keep)
    except OSError as error:
        warn(f"saved {target.name}, but older checkpoints in {folder} could not be removed: {error}")
    return target


def load(path: Path, *, optimizer: bool = True, digests: bool = True, warn: Warn = warnings.warn) -> Checkpoint:
    """Read a step folder, the newest good step of a run's folder, or, by its name, a model that comes along or of the
    Hub.

    `optimizer=False` leaves the optimizer's tensors unread (their digests are still checked); `digests=False`
    skips the digests, not the other checks, for a folder that was verified just before. Tensors are mapped
    from the files, so memory fills as they are used. Raises CheckpointError.
    """
    with _told_as_checkpoint_error(path):
        digests = digests and not is_name(path)  # what is fetched was just compared
        path = located(path)
        one = is_step(path)
    if not one:
        found = newest(path, warn=warn)
        if found is None:
            raise CheckpointError(f"no checkpoint in {path}; expected a folder like step-000001000 in it{_GIVE}")
        path, digests = found, False
    with _told_as_checkpoint_error(path):
        manifest = _check(path, digests=digests)
        return _read(path, manifest, optimizer=optimizer)


def newest(folder: Path, *, warn: Warn = warnings.warn) -> Path | None:
    """The newest step of a run's folder that passes `verify`; None where nothing was saved yet.

    Each damaged step that is passed over is told to `warn`. Raises CheckpointError when all are damaged, or
    when `folder` is not a folder.
    """
    folder = Path(folder)
    with _told_as_checkpoint_error(folder):
        if not folder.is_dir():
            beside = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
            near = plain.nearest(str(folder), MODELS) or plain.nearest(folder.name, beside)
            raise CheckpointError(f"no checkpoint at {folder}; there is no such folder{near or _GIVE}")
        steps = _steps(folder)
    damaged = []
    for path in reversed(steps):
        try:
            verify(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            warn(f"{message}; falling back to {path.name}")
        return path
    if damaged:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; the newest: {damaged[0]}")
    return None


def verify(path: Path) -> None:
    """Check a step folder byte for byte. Raises CheckpointError naming the first bad file, with the expected
    and the actual size or digest."""
    with _told_as_checkpoint_error(path):
        _check(located(path))


def best(folder: Path) -> Path | None:
    """The step of a run's folder with the lowest `state["validation"]`, of equal ones the oldest; None if none has one.

    It reads small files only and checks no digests: `load` does.
    """
    steps = [path for path in _steps(Path(folder)) if not path.name.startswith(".")]
    found = [(value, path) for path in steps if (value := _validation(path)) is not None]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def is_step(path: Path) -> bool:
    """Whether a path is one step (rather than a run's folder of steps), whatever its name and state."""
    return bool(_STEP.fullmatch(path.name)) or (path / seal.MANIFEST).exists()


def holds_steps(folder: Path) -> bool:
    """Whether a run's folder has a step, good or bad."""
    return folder.is_dir() and bool(_steps(folder))


_GIVE = ": give a run's folder or one of its steps"
_STEP = re.compile(r"(?:\.replaced-)?step-(\d{9,12})")
_LEFT_OVER = re.compile(r"\.(?:saving|pruning|replaced)-step-\d{9,12}(?:-\d+)?")
_NEEDED = ("model.safetensors", "config.json", "tokenizer.json", "state.json")
_ALLOWED = re.compile("|".join([*map(re.escape, _NEEDED), re.escape("ema.safetensors"), parts.PATTERN.pattern]))
_READ = ("seconds", "validation", "bits_per_byte")  # of a state, by those who write and score
_TOKENIZER_LIMIT = 64 * 2**20  # bytes; the largest that are in use have 33 MB
_OBJECT_LIMIT = 8 * 2**20


# -- writing -----------------------------------------------------------------------------------------------


@contextmanager
def _told_as_save_error(target: Path, checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _os_error_in(str(error))
        reason = os.strerror(number) if number else str(error)
        remedy = "choose another folder"
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = f"it needs {_size(checkpoint) / 1e6:.1f} MB; free some space or choose another folder"
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "make it writable or choose another folder"
        message = f"could not save {target}: {reason}; {remedy} (earlier checkpoints are untouched)"
        raise SaveError(target, message) from error


def _os_error_in(message: str) -> int:
    found = re.search(r"os error (\d+)", message)
    return int(found[1]) if found else 0


def _size(checkpoint: Checkpoint) -> int:
    groups = (checkpoint.model, checkpoint.ema or {}, checkpoint.optim)
    return sum(tensor.nbytes for group in groups for tensor in group.values())


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True)
        seal.sync(folder.parent)


def _recover(folder: Path) -> None:
    """Clear away what crashed saves left: half-written steps go; a step moved away for a replacement that
    never came gets its name back."""
    for left_over in sorted(folder.iterdir()):
        if not _LEFT_OVER.fullmatch(left_over.name):
            continue
        name = left_over.name.removeprefix(".replaced-")
        if name != left_over.name and not (folder / name).exists():
            left_over.rename(folder / name)
        else:
            shutil.rmtree(left_over)


def _write(folder: Path, checkpoint: Checkpoint, texts: dict[str, str]) -> None:
    """What rank 0 writes: all but the other ranks' shards."""
    groups = {"model.safetensors": checkpoint.model}
    if checkpoint.ema is not None:
        groups["ema.safetensors"] = checkpoint.ema
    if checkpoint.optim:
        groups[parts.shard(0)] = checkpoint.optim
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    for name, tensors in groups.items():
        (folder / name).parent.mkdir(exist_ok=True)
        parts.write(folder, name, tensors)


def _write_shard(folder: Path, checkpoint: Checkpoint, rank: int) -> None:
    """What another rank writes, on disk when it returns: rank 0 may be on another machine."""
    if checkpoint.optim:
        parts.write(folder, parts.shard(rank), checkpoint.optim)
        seal.sync(folder / parts.shard(rank))


def _seal(folder: Path, checkpoint: Checkpoint, num_shards: int) -> None:
    names = ["model.safetensors", *(["ema.safetensors"] if checkpoint.ema is not None else [])]
    names += [parts.shard(rank) for rank in range(num_shards)] if checkpoint.optim else []
    seal.seal(folder, [*names, "config.json", "tokenizer.json", "state.json"], step=checkpoint.step)


def _refuse_unreadable(folder: Path) -> None:
    """ValueError for what `load` would refuse: better told now than when it is needed."""
    try:
        _check(folder, digests=False)
        _texts(folder)
    except ValueError as error:
        raise ValueError(f"a checkpoint of this could not be loaded: {error}") from error


def _publish(temporary: Path, target: Path) -> None:
    """Give a complete folder its name. An older folder of that name is moved away first, under a name that
    loading and `_recover` still know, so that at every moment one of the two can be read."""
    replaced = target.with_name(f".replaced-{target.name}")
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    seal.sync(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced, ignore_errors=True)


def _prune(folder: Path, step: int, keep: int | None) -> None:
    steps = [path for path in _steps(folder) if not path.name.startswith(".")]
    for path in steps:
        if _step_of(path) > step:
            shutil.rmtree(folder / f"abandoned-{path.name}", ignore_errors=True)
            path.rename(folder / f"abandoned-{path.name}")
    current = [path for path in steps if _step_of(path) <= step]
    older = current[: -keep if keep else 0]
    spared = best(folder) if older else None
    for path in older:
        if path == spared:
            continue
        path.rename(folder / f".pruning-{path.name}")
        shutil.rmtree(folder / f".pruning-{path.name}")


# -- reading -----------------------------------------------------------------------------------------------


@contextmanager
def _told_as_checkpoint_error(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (seal.SealError, HubError) as error:
        raise CheckpointError(str(error)) from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error}") from error


def _steps(folder: Path) -> list[Path]:
    """The steps of a run's folder, oldest first; one moved away for its replacement comes before it."""
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (_step_of(path), not path.name.startswith(".")))


def _step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    assert match
    return int(match[1])


def _validation(path: Path) -> float | None:
    """What a step recorded of its validation; None if nothing, or if it cannot be read."""
    try:
        value = _object(path / "state.json").get("validation")
    except (OSError, ValueError):
        return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _check(folder: Path, *, digests: bool = True) -> dict[str, Any]:
    return seal.check(folder, needed=_NEEDED, allowed=_ALLOWED, digests=digests)


def _read(folder: Path, manifest: dict[str, Any], *, optimizer: bool) -> Checkpoint:
    texts = _texts(folder)
    shards = sorted(filter(parts.PATTERN.fullmatch, manifest["files"]))
    has_average = "ema.safetensors" in manifest["files"]
    return Checkpoint(
        step=manifest["step"],
        model=load_file(folder / "model.safetensors"),
        ema=load_file(folder / "ema.safetensors") if has_average else None,
        optim=parts.joined(folder, shards, texts["state"].get("ranks", 1)) if optimizer and shards else {},
        **texts,
    )


def _texts(folder: Path) -> dict[str, Any]:
    return {
        "config": _object(folder / "config.json"),
        "tokenizer_json": seal.text(folder / "tokenizer.json", limit=_TOKENIZER_LIMIT),
        "state": _object(folder / "state.json"),
    }


def _object(path: Path) -> dict[str, Any]:
    data = plain.parse(seal.text(path, limit=_OBJECT_LIMIT))
    if not isinstance(data, dict):
        raise seal.SealError(f"{path} must hold a JSON object, found {type(data).__name__}")
    return data
