"""A family of models on one text, with equal tokens and equal size each: what docs/results.md compares.

    tokens/            the tokenizer that all share
    ar/ mdlm/ bd3lm-4/ ... esolm-b-0.0625/      a run each, trained by `esolm train` in a process of its own

A member that is trained is left alone and one that was interrupted goes on, so the same call again continues. It
measures nothing: see evaluate.py and frontier.py.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from esolm import checkpoint, plain, prepare, recipes
from esolm.algorithms import AR
from esolm.journal import FILE

_DATA = "classics"
_NUM_STEPS = recipes.family(AR(), 2).num_steps
_LOOK = 0.5  # seconds between looks at the members


@dataclass(frozen=True, kw_only=True)
class Member:
    """A model of the family, by the options that `recipes.method` and `esolm train` know."""

    name: str
    model: str
    alpha_0: float | None = None
    block_size: int | None = None

    def options(self) -> list[str]:
        """Its options of `esolm train`."""
        given = {"--model": self.model, "--alpha-0": self.alpha_0, "--block-size": self.block_size}
        return [word for name, value in given.items() if value is not None for word in (name, str(value))]


def _eso(variant: str, *alphas: float) -> list[Member]:
    return [Member(name=f"esolm-{variant}-{a:g}", model=f"esolm-{variant}", alpha_0=a) for a in alphas]


MEMBERS: tuple[Member, ...] = (
    Member(name="ar", model="ar"),
    Member(name="mdlm", model="mdlm"),
    *_eso("b", 0.0, 0.0625, 0.125, 0.25, 0.5, 1.0),
    *(Member(name=f"bd3lm-{size}", model="bd3lm", block_size=size) for size in (4, 8, 16)),
    *_eso("a", 0.0625, 0.125, 0.25, 0.5, 1.0),
)


def train(
    folder: Path,
    *,
    workers: int = 2,
    members: Sequence[Member] = MEMBERS,
    settings: Sequence[str] = (),
    vocab_size: int = 2048,
    console: Console | None = None,
) -> None:
    """Train the members that are not trained yet, `workers` at a time, the processor's threads shared among them.

    `settings` are those of `esolm train --set`, for all members alike. ChildProcessError names a member that failed and
    where its words are; the others end first. Ctrl-C stops all, each saved.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    tokens = folder / "tokens"
    if not (tokens / "tokenizer.json").exists():
        prepare.tokens(prepare.Source(data=_DATA), tokens, vocab_size=vocab_size, console=console)
    threads = max(1, torch.get_num_threads() // workers)
    todo = [member for member in members if not _done(folder / member.name)]
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    columns = TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bars:
        tasks = {member.name: bars.add_task(member.name, total=_NUM_STEPS, start=False) for member in todo}
        try:
            while todo or running:
                while todo and len(running) < workers:
                    member = todo.pop(0)
                    running[member.name] = _started(folder, member, settings, threads)
                    bars.start_task(tasks[member.name])
                time.sleep(_LOOK)
                for name, process in list(running.items()):
                    bars.update(tasks[name], completed=_step(folder / name))
                    if process.poll() is not None:
                        running.pop(name)
                        failed += [name] if process.returncode else []
        finally:
            for process in running.values():
                process.terminate()  # it saves
            for process in running.values():
                process.wait()
    if failed:
        raise ChildProcessError(f"{', '.join(failed)} could not be trained: see {folder / failed[0] / 'words.txt'}")


def _started(folder: Path, member: Member, settings: Sequence[str], threads: int) -> "subprocess.Popen[bytes]":
    """The training of a member in a process of its own; its words go to a file beside its journal."""
    place = folder / member.name
    place.mkdir(parents=True, exist_ok=True)
    begun = checkpoint.newest(place, warn=lambda _: None) is not None
    tokenizer = ["--tokenizer", str(folder / "tokens" / "tokenizer.json")]
    new = ["--recipe", "family", "--data", _DATA, *tokenizer, *member.options()]
    new += ["--set", *settings] if settings else []
    words = ["train", "--out", str(place), *(["--resume"] if begun else new)]
    with (place / "words.txt").open("ab") as told:
        return subprocess.Popen(
            [sys.executable, "-m", "esolm", *words],
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=told,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )


def _done(place: Path) -> bool:
    """Has a member all its steps?"""
    if not place.is_dir() or checkpoint.newest(place, warn=lambda _: None) is None:
        return False
    saved = checkpoint.load(place, optimizer=False, digests=False)
    return bool(saved.step >= saved.config["run"]["num_steps"])


def _step(place: Path) -> int:
    """The last step that a member's journal tells of."""
    path = place / FILE
    lines = path.read_bytes().splitlines()[-2:] if path.exists() else []
    steps = [entry["step"] for line in lines if isinstance(entry := _entry(line), dict) and "step" in entry]
    return int(max(steps, default=0))


def _entry(line: bytes) -> object:
    try:
        return plain.parse(line.decode(errors="replace"))
    except ValueError:  # it is being written
        return None
