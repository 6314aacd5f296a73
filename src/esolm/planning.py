"""What a run will take of a rank's memory, and the largest micro batch that leaves a share of it free.

The bytes are those of a rehearsal (`rehearsal`). What it does not know is what the free share is for.
"""

import re
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from esolm.memory import TooLarge
from esolm.rehearsal import Footprint, Rehearsal
from esolm.run import Run
from esolm.tables import ruled

GB = 1e9
RESERVE = {"cpu": 1 / 3, "cuda": 0.1}
"""Of the memory stays free. A CPU's malloc leaves holes between arrays of all sizes (docs/scale.md)."""
_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What fits. `asked` is the run as it is set, `best` the largest micro batch of its texts that fits."""

    parameters: int
    ranks: int
    sharded: bool
    device: str
    dtype: str
    texts: int  # that a rank learns from at once, if no smaller micro batch is set
    asked: Footprint
    best: Footprint
    memory: float
    reserve: float
    host: int  # bytes of the copy for saving in the machine's memory, where that is another one
    cache: int  # bytes of keys and values, to write one text of the run's length

    def values(self) -> dict[str, Any]:
        """Plain figures, for JSON; bytes."""
        told = asdict(self)
        for name in ("asked", "best"):
            told[name]["total"] = getattr(self, name).total
        return {**told, "largest_micro_batch": self.best.micro_batch}


def plan(run: Run, *, memory: float, ranks: int = 1, device: str = "cpu", reserve: float | None = None) -> Plan:
    """The memory of each of `ranks` ranks that train this run, and the largest micro batch for `memory` bytes each.

    `device` (cpu or cuda) need not be here. TooLarge if not even one text at a time fits; ValueError for what cannot
    be."""
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if run.batch_size < ranks:
        raise ValueError(f"a batch of {run.batch_size} texts is too small for {ranks} ranks: raise batch_size")
    reserve = RESERVE["cpu" if device == "cpu" else "cuda"] if reserve is None else reserve
    if not 0 <= reserve < 1:
        raise ValueError(f"reserve is the share that stays free and must lie in [0, 1), got {reserve}")
    room, rehearsal = memory * (1 - reserve), Rehearsal(run, ranks, device)
    best = _largest(rehearsal, room)
    if not best:
        raise TooLarge(_missing(rehearsal, memory, room))
    return Plan(
        parameters=rehearsal.parameters,
        ranks=ranks,
        sharded=rehearsal.sharded,
        device=device,
        dtype="bfloat16" if rehearsal.bf16 else "float32",
        texts=rehearsal.texts,
        asked=rehearsal.of(min(run.micro_batch or rehearsal.texts, rehearsal.texts)),
        best=rehearsal.of(best),
        memory=memory,
        reserve=reserve,
        host=0 if device == "cpu" else rehearsal.copy,
        cache=rehearsal.cache,
    )


def size(words: str) -> float:
    """Bytes from a size with its unit, as 80GB or 24 GiB. ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]i?B)\s*", words, re.IGNORECASE)
    if found is None or not float(found[1]) > 0:
        raise ValueError(f"memory must be a size with a unit, as 80GB, 512MB or 24GiB, got {words!r}")
    return float(found[1]) * _UNITS[found[2].upper()]


def table(found: Plan) -> Table:
    """The bytes of each rank as a table for the terminal: as the run is set, and at the largest micro batch."""
    kind = "in shards" if found.sharded else "replicated" if found.ranks > 1 else "alone"
    title = f"memory of each of {found.ranks} ranks, {kind}" if found.ranks > 1 else "memory of one rank"
    shown = ruled(f"{title}, GB ({found.device}, {found.dtype})")
    shown.add_column("")
    columns = [found.best] if found.asked == found.best else [found.asked, found.best]
    for footprint in columns:
        shown.add_column(f"micro batch {footprint.micro_batch}", justify="right")
    for name, told in _NAMES.items():
        values = [footprint.parts()[name] for footprint in columns]
        if any(values):
            shown.add_row(told, *(f"{value / GB:.3f}" for value in values))
    shown.add_section()
    shown.add_row("together", *(f"{footprint.total / GB:.3f}" for footprint in columns))
    return shown


_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "moments of the optimizer",
    "average": "averaged weights",
    "gathered": "weights gathered from shards",
    "activations": "activations of a micro batch",
    "kernels": "kernels that oneDNN keeps",
    "saving": "copy for saving meanwhile",
}


def _largest(rehearsal: Rehearsal, room: float) -> int:
    """The largest micro batch that fits, up to all texts of a rank: by halves, the whole first. 0 if none does."""
    fits, above, middle = 0, rehearsal.texts + 1, rehearsal.texts
    while above - fits > 1:
        fits, above = (middle, above) if rehearsal.of(middle).total <= room else (fits, middle)
        middle = (fits + above) // 2
    return fits


def _missing(rehearsal: Rehearsal, memory: float, room: float) -> str:
    """What to say when nothing fits, with remedies that are not in use yet."""
    run, needed = rehearsal.run, rehearsal.of(1).total
    tries = [] if run.recompute else ["--set recompute=true"]
    if not rehearsal.sharded:
        tries += ["--set shard=true" + ("" if rehearsal.ranks > 1 else " on several ranks")]
    else:
        tries += ["more ranks"]
    tries += ["a smaller network.width, network.layers or network.length"]
    return (
        f"nothing fits: one text at a time takes {needed / GB:.2f} GB of each rank, and {room / GB:.2f} GB of the "
        f"{memory / GB:.2f} GB may be used: {(needed - room) / GB:.2f} GB are missing; try {', '.join(tries)}"
    )
