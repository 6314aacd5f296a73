"""A checkpoint made ready for others: what writing and scoring need, with a card beside it.

It sends nothing anywhere (`hub.push` does).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from esolm import checkpoint, hub
from esolm.card import card, data_name
from esolm.model import of


def pack(path: str | Path, place: Path, name: str, *, licence: str | None = None, whole: bool = False) -> Path:
    """The folder, inside `place`, of a checkpoint's copy with its card: the averaged weights in float32, or, `whole`,
    all that training needs to go on, but for the folders that its data are in: those stay here. `name` is what it will
    be called. CheckpointError; SaveError, of a disk."""
    saved = checkpoint.load(Path(path), optimizer=whole)
    folder = checkpoint.save(place, _without_folders(saved) if whole else saved.for_readers(), keep=None)
    (folder / hub.CARD).write_text(card(of(saved, path), name, licence=licence), encoding="utf-8")
    return folder


def _without_folders(saved: checkpoint.Checkpoint) -> checkpoint.Checkpoint:
    origin = saved.state.get("origin")
    return replace(saved, state={**saved.state, "origin": _named(origin)}) if origin else saved


def _named(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Where data came from, as `prepare` records it, by last names."""
    if "sources" in origin:
        return {**origin, "sources": [_named(source) for source in origin["sources"]]}
    return {**origin, "data": data_name(str(origin["data"]))}
