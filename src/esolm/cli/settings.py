"""Settings of a run on the command line: a recipe and a method, changed by `--set key=value`, shown by their keys."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from esolm.cli.parsing import Maybe, MethodName

if TYPE_CHECKING:
    from esolm.prepare import Mixed, Source
    from esolm.train import Run

VOCAB_SIZE = 4096  # of a tokenizer that is learned


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained."""

    recipe: Literal["demo", "shakespeare", "family", "lm1b", "owt"] = "shakespeare"
    """The settings to begin with."""
    model: MethodName = "esolm-b"
    """The method."""
    alpha_0: Maybe[float] = None
    """Eso-LM: share of the text that diffusion writes, 0 to 1."""
    block_size: Maybe[int] = None
    """BD3-LM: tokens of a block."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...", help_behavior_hint="")] = ()
    """Other settings, as in network.width=512."""
    seed: int = 0
    """Of the weights, the order of the data and all noise."""


def run_of(settings: Settings, vocab_size: int = VOCAB_SIZE) -> "Run":
    """The run of a recipe, before other settings; the tokenizer will tell the size of its vocabulary."""
    from esolm import recipes

    method = recipes.method(settings.model, settings.alpha_0, settings.block_size)
    run: Run = getattr(recipes, settings.recipe)(method, vocab_size)
    return run


def changed(run: "Run", settings: Settings, minutes: float | None = None) -> "Run":
    """The run with the settings of `--set`, `--seed` and `--minutes`."""
    from esolm.plain import replace

    changes = _assignments(settings.set)
    for key, option in (("seed", "--seed"), ("minutes", "--minutes"), ("network.vocab_size", "--vocab-size")):
        if key in changes:
            raise ValueError(f"{key} has an option of its own: use {option}")
    known = keys(run)
    for key in changes:
        inner = [name for name in known if name.endswith(f".{key}")]
        if inner:
            raise ValueError(f"there is no setting {key!r}; did you mean {' or '.join(map(repr, inner))}?")
    try:
        return replace(run, {**changes, "seed": settings.seed, "minutes": minutes})
    except ValueError as problem:
        hint = "; --set help lists the keys" if "unknown key" in str(problem) else ""
        raise ValueError(f"{problem}{hint}") from None


def keys(run: "Run | Source | Mixed") -> dict[str, str]:
    """Every setting of a run (or of sources) by its dotted key, as `--set` takes it."""
    from esolm.plain import to_plain

    found: dict[str, str] = {}
    inside = [("", to_plain(run))]
    while inside:
        key, value = inside.pop()
        value = dict(enumerate(value)) if isinstance(value, list) and value and isinstance(value[0], dict) else value
        if isinstance(value, dict):
            inside += reversed([(f"{key}.{name}".removeprefix("."), part) for name, part in value.items()])
        else:
            found[key] = value if isinstance(value, str) else json.dumps(value)
    return found


def _assignments(settings: Sequence[str]) -> dict[str, object]:
    """`key=value` settings; a value is JSON where it is JSON, else a word."""
    changes: dict[str, object] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {setting!r}")
        try:
            changes[key] = json.loads(value)
        except ValueError:
            changes[key] = value
    return changes
