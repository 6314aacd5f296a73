"""Texts for the terminal and for files: one live, several with progress, or JSON lines that survive Ctrl-C.

It joins a model, a watch and a file; it decides nothing about how a text is written.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import track

from esolm import corpus
from esolm.algorithms import Request
from esolm.model import Model, seed_of
from esolm.plain import FileError
from esolm.watch import Watch

_AT_ONCE = 16
_DRAWING = ("seed", "top_p", "top_k", "temperature", "alpha_0", "num_steps")  # of a line of `as_json`


def requests_of(first: Request, num: int, seed: int) -> list[Request]:
    """A request `num` times, under the seeds that `Model.sample` gives its texts."""
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    return [replace(first, seed=seed_of(seed, number)) for number in range(num)]


def show(model: Model, requests: Sequence[Request], *, live: bool, console: Console, slower: float = 0.0) -> None:
    """Write texts one after the other, each shown while it is written. Ctrl-C leaves what is written so far."""
    for number, request in enumerate(requests):
        if number:
            console.rule(style="dim")
        with watching(model, request, live=live, console=console, slower=slower) as watch:
            for reveal in model.write([request]):
                watch.reveal(reveal)


def watching(model: Model, request: Request, *, live: bool, console: Console, slower: float = 0.0) -> Watch:
    """A watch for a request of a model."""
    return Watch(
        request.length,
        decode=model.tokenizer.decode,
        given=request.given,
        end_id=model.tokenizer.end_id if request.stop_at_end else None,
        console=console,
        live=live,
        slower=slower,
    )


def as_json(model: Model, requests: Sequence[Request], path: Path | None, *, console: Console) -> None:
    """Write texts, a few together, as JSON lines to a file or to standard output, each as soon as it is done.

    Ctrl-C leaves the lines of the finished texts. ValueError, before anything is written by the model, for a file that
    cannot be made or holds something already.
    """
    file = sys.stdout if path is None else _opened(path)
    done = 0
    try:
        for record in track(
            _records(model, requests), description="writing", total=len(requests), console=console, transient=True
        ):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            done += 1
    except KeyboardInterrupt:
        place = "" if path is None else f" and kept in {path}"
        console.print(f"{done} of {len(requests)} texts are finished{place}", highlight=False, markup=False)
        raise
    finally:
        if path is not None:
            file.close()


def drawing_of(source: str | Path) -> dict[str, Any]:
    """How the texts of a file were drawn, as far as each of its lines says so: those of `as_json` do.

    One value of each option or, where lines differ, all of them. Seeds that one seed gave are that one.
    """
    lines, found = list(corpus.extras(source, _DRAWING)), {}
    for name in _DRAWING:
        values = [line[name] for line in lines if isinstance(line.get(name), int | float) and math.isfinite(line[name])]
        if lines and len(values) == len(lines):
            distinct = sorted(set(values))
            distinct = _asked_with(distinct) if name == "seed" else distinct
            found[name] = distinct[0] if len(distinct) == 1 else distinct
    return found


def _asked_with(seeds: list[Any]) -> list[Any]:
    """The seed that gave these to texts 0, 1, 2, ..., or these if there is none."""
    seed = int(seeds[0]) // seed_of(1, 0)
    return [seed] if seeds == [number + seed * seed_of(1, 0) for number in range(len(seeds))] else seeds


def _opened(path: Path) -> TextIO:
    """A new file, or one that is empty; never one with something in it."""
    if path.is_file() and path.stat().st_size:
        raise ValueError(f"{path} exists already and would be lost: remove it, or choose another file")
    try:
        return path.open("w", encoding="utf-8")
    except OSError as problem:
        why = (problem.strerror or str(problem)).lower()
        raise FileError(f"cannot write to {path}: {why}; choose a file in a folder that can be written") from None


def _records(model: Model, requests: Sequence[Request]) -> Iterator[dict[str, Any]]:
    for at in range(0, len(requests), _AT_ONCE):
        part = requests[at : at + _AT_ONCE]
        for request, written in zip(part, model.complete(part), strict=True):
            tokens = written.tokens.tolist()
            yield {
                "text": model.tokenizer.decode(tokens),
                "tokens": tokens,
                "seed": request.seed,
                "nfe": written.nfe,
                "temperature": request.draw.temperature,
                "top_k": request.draw.top_k,
                "top_p": request.draw.top_p,
                "alpha_0": request.alpha_0,
                "num_steps": request.num_steps,
            }
