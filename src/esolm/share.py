"""A checkpoint made ready for others: what writing and scoring need, with a card beside it.

It sends nothing anywhere (`hub.push` does).
"""

from pathlib import Path

from esolm import checkpoint, hub
from esolm.card import card
from esolm.model import of


def pack(path: str | Path, place: Path, name: str, *, licence: str | None = None, whole: bool = False) -> Path:
    """The folder, inside `place`, of a checkpoint's copy with its card: the averaged weights in float32, or, `whole`,
    all that training needs to go on. `name` is what it will be called. CheckpointError; SaveError, of a disk."""
    saved = checkpoint.load(Path(path), optimizer=whole)
    folder = checkpoint.save(place, saved if whole else saved.for_readers(), keep=None)
    (folder / hub.CARD).write_text(card(of(saved, path), name, licence=licence), encoding="utf-8")
    return folder
