"""How good models are at a text, on one scale: exact likelihoods, NELBOs and importance-weighted bounds in one table.

Documents are cut into windows of the model's length; each is scored after `context` tokens of what came before it,
which are read and not scored. End-of-text is scored. Models of one length and tokenizer see the same windows, and all
models the same bytes unless only some windows are asked for. Perplexity depends on the tokenizer; bits a byte does not.
It trains and draws nothing.
"""

import hashlib
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from esolm import likelihood, plain, records
from esolm.algorithms import EsoLM
from esolm.algorithms.algorithm import Algorithm, Batch
from esolm.inference import Network, describe
from esolm.likelihood import Estimate, Kind
from esolm.model import Model
from esolm.noise import Noise, generator
from esolm.records import Records
from esolm.tables import ruled

_AT_ONCE = 16
_RESAMPLED = 1000  # times that documents are drawn again for an interval
_COVERED = 0.95
_BOOTSTRAP = 20  # purpose of its random numbers


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure of one model. `interval` has the nats a token of 95 of 100 collections of such documents (bootstrap);
    None for a single document. `conditional` says what a masked row reads in it: see docs/ARCHITECTURE.md. Models of
    the Eso-LM kind have a `variant` and an `alpha_0`."""

    name: str
    method: str
    estimate: Estimate
    num_bytes: int
    conditional: str
    context: int = 0
    num_documents: int = 1
    interval: tuple[float, float] | None = None
    variant: str | None = None
    alpha_0: float | None = None

    def values(self) -> dict[str, Any]:
        """Plain figures, for JSON; None for what one text or one draw cannot tell."""
        found = self.estimate
        return {
            "name": self.name,
            "method": self.method,
            "alpha_0": self.alpha_0,
            "kind": found.kind,
            "conditional": self.conditional,
            "nats_per_token": found.nats_per_token,
            "standard_error": None if math.isnan(found.standard_error) else found.standard_error,
            "monte_carlo_error": found.monte_carlo_error,
            "interval": None if self.interval is None else list(self.interval),
            "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte(self.num_bytes),
            "tokens": found.num_tokens,
            "bytes": self.num_bytes,
            "windows": found.num_texts,
            "documents": self.num_documents,
            "context": self.context,
            "samples": found.samples,
        }


def evaluate(
    model: Model,
    documents: Sequence[str],
    *,
    name: str = "model",
    samples: int = 4,
    orders: Sequence[int] = (),
    texts: int | None = None,
    context: int = 0,
    seed: int = 0,
    as_written: bool = False,
    scores: Path | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Measures of a model over documents: the NELBO (the exact value, where nothing is written by diffusion) from
    `samples` draws a window and, for methods that have one (`Algorithm.one_pass`), the importance-weighted bound of
    each number of `orders`. `texts`: at most this many windows, evenly spread. `context`: tokens that a window reads of
    the one before it. `as_written`: by the network that writes, to see what its smaller weights cost.

    `scores`: a folder that keeps the score of every window, so that an interrupted evaluation goes on. ValueError for
    options that do not fit, ArithmeticError for a score that is not finite.
    """
    _check(model, samples, orders, texts, context)
    windows = _windows(model, documents, context)
    if not windows:
        raise ValueError("there is no text to score: every document is empty")
    count = min(texts or len(windows), len(windows))
    windows = [windows[number * len(windows) // count] for number in range(count)]
    exact = model.algorithm.bound_is_exact
    plans: list[tuple[Kind, list[int]]] = [("exact", [1]) if exact else ("NELBO", [samples])]
    if orders and model.algorithm.one_pass and not exact:
        plans.append(("importance-weighted bound", sorted(set(orders))))
    network = model.writer if as_written else model.denoiser
    num_bytes = sum(_bytes_of(model, window) for window in windows)
    rows = []
    for kind, numbers in plans:
        measure = _Measure(network=network, kind=kind, samples=numbers[-1], seed=seed)
        kept = None if scores is None else Records(scores, "scores", _key(model, measure, windows, as_written))
        with kept or nullcontext(), Progress(console=console, transient=True) as bar:
            each = _scored(model, measure, windows, kept, bar, f"{name} · {kind}")
        rows += [
            Row(
                name=name,
                method=repr(model.algorithm),
                estimate=likelihood.summary(each[:, :number], _lengths(windows), kind),
                num_bytes=num_bytes,
                conditional=_conditional(model.algorithm, kind),
                context=context,
                num_documents=len({window.document for window in windows}),
                interval=_interval(kind, each[:, :number], windows, seed),
                variant=model.algorithm.variant if isinstance(model.algorithm, EsoLM) else None,
                alpha_0=model.algorithm.alpha_0 if isinstance(model.algorithm, EsoLM) else None,
            )
            for number in numbers
        ]
    return rows


def table(rows: Sequence[Row]) -> Table:
    """The rows as a table for the terminal: those columns of `markdown` that fit into 80."""
    shown = ruled("likelihood")
    wide = ("95 % of texts", "± draws")
    for label in _COLUMNS:
        if label not in wide:
            shown.add_column(label, justify="left" if label in ("model", "measure") else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(cell for label, cell in zip(_COLUMNS, _cells(row), strict=True) if label not in wide))
    return shown


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = [_COLUMNS, tuple("---" for _ in _COLUMNS), *map(_cells, rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def keep(rows: Sequence[Row], folder: Path, *, done: bool = True) -> None:
    """Write the table to `table.md`, and all figures to `table.json`; until it is `done`, in place of those of as many
    rows or fewer only."""
    records.keep_table(folder, markdown(rows), [row.values() for row in rows], done=done)


_COLUMNS = ("model", "measure", "nats/token", "±", "95 % of texts", "± draws", "perplexity", "bits/byte", "tokens")


def _cells(row: Row) -> tuple[str, ...]:
    found = row.estimate
    many = f" of {found.samples}" if found.samples > 1 else ""
    bound = "" if found.kind == "exact" else "≤ "
    return (
        row.name,
        f"{found.kind}{many}",
        f"{found.nats_per_token:.4f}",
        "-" if math.isnan(found.standard_error) else f"{found.standard_error:.4f}",
        "-" if row.interval is None else f"{row.interval[0]:.3f} to {row.interval[1]:.3f}",
        "-" if found.monte_carlo_error is None else f"{found.monte_carlo_error:.4f}",
        f"{bound}{found.perplexity:.2f}",
        f"{bound}{found.bits_per_byte(row.num_bytes):.4f}",
        f"{found.num_tokens:,}",
    )


@dataclass(frozen=True, kw_only=True)
class _Measure:
    """What is asked of a network."""

    network: Network
    kind: Kind
    samples: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class _Window:
    """Tokens of a document, of which the first `given` are read and not scored."""

    document: int
    tokens: list[int]
    given: int


def _check(model: Model, samples: int, orders: Sequence[int], texts: int | None, context: int) -> None:
    values = [("samples", samples, 1), ("texts", texts, 1), ("context", context, 0)]
    problems = [
        f"{option} must be at least {least}, got {value}"
        for option, value, least in (*values, *(("orders", number, 1) for number in orders))
        if value is not None and value < least
    ]
    if context >= model.length:
        problems.append(f"context must be smaller than the model's length {model.length}, got {context}")
    if problems:
        raise ValueError("; ".join(problems))


def _windows(model: Model, documents: Sequence[str], context: int) -> list[_Window]:
    """Every token of every document, and its end-of-text, is scored in exactly one window."""
    end = [] if model.tokenizer.end_id is None else [model.tokenizer.end_id]
    windows = []
    for number, document in enumerate(documents):
        ids = [*model.tokenizer.encode(document), *end] if document else []
        at = 0
        while at < len(ids):
            given = min(context, at)
            stop = at - given + model.length
            windows.append(_Window(document=number, tokens=ids[at - given : stop], given=given))
            at = stop
    return windows


def _lengths(windows: Sequence[_Window]) -> Tensor:
    return torch.tensor([len(window.tokens) - window.given for window in windows], dtype=torch.float64)


def _bytes_of(model: Model, window: _Window) -> int:
    """Bytes that a window writes. A character cut in two by the window's edge counts by its bytes in each."""
    scored = window.tokens[window.given :]
    return model.tokenizer.num_bytes([token for token in scored if token != model.tokenizer.end_id])


def _scored(
    model: Model, measure: _Measure, windows: Sequence[_Window], kept: Records | None, bar: Progress, told: str
) -> Float64[Tensor, "text sample"]:
    """Nats of every window under every draw; what is `kept` already is taken from there."""
    found = [] if kept is None else [list(map(float, entry["nats"])) for entry in kept.entries]
    task = bar.add_task(told, total=len(windows), completed=len(found))
    for at in range(len(found), len(windows), _AT_ONCE):
        part = windows[at : at + _AT_ONCE]
        noise = Noise(seed=measure.seed, step=0, start=at, stop=at + len(part), total=len(windows))
        drawn = likelihood.draws(
            measure.network, model.algorithm, _batch(model, part), noise, measure.kind, measure.samples
        )
        sound = int(drawn.isfinite().all(1).long().cumprod(0).sum())  # windows before the first that is not
        if kept is not None:
            for window, nats in zip(part[:sound], drawn[:sound].tolist(), strict=True):
                kept.add({"document": window.document, "tokens": len(window.tokens) - window.given, "nats": nats})
        likelihood.refuse_not_finite(drawn, at)
        found += drawn.tolist()
        bar.advance(task, len(part))
    return torch.tensor(found, dtype=torch.float64)


def _batch(model: Model, windows: Sequence[_Window]) -> Batch:
    """Windows padded to the model's length."""
    tokens = torch.full((len(windows), model.length), model.tokenizer.pad_id)
    lengths = torch.tensor([len(window.tokens) for window in windows])[:, None]
    given = torch.tensor([window.given for window in windows])[:, None]
    for row, window in enumerate(windows):
        tokens[row, : len(window.tokens)] = torch.tensor(window.tokens)
    places = torch.arange(model.length)
    return Batch(tokens=tokens, given=places < given, valid=places < lengths)


def _conditional(algorithm: Algorithm, kind: Kind) -> str:
    """What masked rows of the terms read: tokens only, or also other masks of their step."""
    if kind != "NELBO":
        return "sequential"
    batch, noise = Batch.of(torch.zeros(1, 2 * algorithm.length_multiple).long()), _ONE
    terms = {view.term for view in algorithm.bound(batch, noise, 1)}
    return " and ".join(name for term, name in _CONDITIONALS if term in terms)


_CONDITIONALS = (("diffusion", "parallel"), ("sequential", "sequential"))
_ONE = Noise(seed=0, step=0, start=0, stop=1, total=1)


def _interval(
    kind: Kind, each: Float64[Tensor, "text sample"], windows: Sequence[_Window], seed: int
) -> tuple[float, float] | None:
    """Nats a token of documents drawn again with replacement: the middle 95 % of a thousand such collections."""
    document = np.unique([window.document for window in windows], return_inverse=True)[1]
    count = int(document.max()) + 1
    if count < 2:
        return None
    nats, tokens = (np.bincount(document, x.numpy()) for x in (likelihood.combined(kind, each), _lengths(windows)))
    drawn = generator(seed, _BOOTSTRAP).integers(count, size=(_RESAMPLED, count))
    found = nats[drawn].sum(1) / tokens[drawn].sum(1)
    low, high = np.quantile(found, [(1 - _COVERED) / 2, (1 + _COVERED) / 2])
    return float(low), float(high)


def _key(model: Model, measure: _Measure, windows: Sequence[_Window], as_written: bool) -> dict[str, Any]:
    """All that decides on the scores of windows."""
    texts = hashlib.sha256(repr([(window.document, window.given, window.tokens) for window in windows]).encode())
    return {
        "weights": model.digest,
        "network": plain.to_plain(model.denoiser.config),
        "algorithm": plain.to_plain(model.algorithm),
        "windows": texts.hexdigest(),
        "kind": measure.kind,
        "samples": measure.samples,
        "seed": measure.seed,
        "draws": "by position",  # before, they depended on the padding: scores of both kinds must not mix
        "products": describe(model.writer) if as_written else "float32",
    }
