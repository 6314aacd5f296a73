"""Models that come along with the package, by name: to write with at once, with no training and no network.

    esolm sample esolm-shakespeare          esolm.load("esolm-shakespeare")

A name stands for the folder of a checkpoint wherever one is asked for; a file or folder of that name comes first. What
each is good for, its figures, its data and its licence: the card beside its folder.
"""

from importlib.resources import files
from pathlib import Path

MODELS = ("esolm-shakespeare",)


def located(path: str | Path) -> Path:
    """The folder of a model that comes along, if this is its name and nothing here is called so; else the path."""
    path = Path(path)
    return _MODELS / path if str(path) in MODELS and not path.exists() else path


def card(name: str) -> str:
    """The card of a model that comes along, in Markdown. ValueError if there is none of that name."""
    if name not in MODELS:
        raise ValueError(f"no model {name!r} comes with esolm; there is {', '.join(MODELS)}")
    return (_MODELS / f"{name}.md").read_text(encoding="utf-8")


_MODELS = Path(str(files("esolm") / "assets" / "models"))
