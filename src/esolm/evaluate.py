"""How good models are at a text, on one scale: exact likelihoods, NELBOs and importance-weighted bounds in one table.

Documents are cut into windows of the model's length, each scored without what came before it, end-of-text tokens
included, so that models of one length and tokenizer see the same windows, and all models the same bytes unless only
some windows are asked for. Perplexity depends on the tokenizer; bits a byte does not. It trains and draws nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from esolm import likelihood
from esolm.algorithms.algorithm import Batch
from esolm.likelihood import Estimate
from esolm.model import Model

_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure of one model."""

    name: str
    method: str
    estimate: Estimate
    num_bytes: int

    def values(self) -> dict[str, Any]:
        """Plain figures, for JSON."""
        found = self.estimate
        return {
            "name": self.name,
            "method": self.method,
            "kind": found.kind,
            "nats_per_token": found.nats_per_token,
            "standard_error": found.standard_error,
            "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte(self.num_bytes),
            "tokens": found.num_tokens,
            "bytes": self.num_bytes,
            "windows": found.num_texts,
            "samples": found.samples,
        }


def evaluate(
    model: Model,
    documents: Sequence[str],
    *,
    name: str = "model",
    samples: int = 4,
    orders: int = 0,
    texts: int | None = None,
    seed: int = 0,
    as_written: bool = False,
    console: Console | None = None,
) -> list[Row]:
    """Measures of a model over documents: the NELBO (the exact value, where nothing is written by diffusion) from
    `samples` draws a window and, with `orders`, the importance-weighted bound of that many for methods that have one
    (see `Algorithm.one_pass`). `texts`: at most this many windows, evenly spread.
    `as_written`: by the network that writes, to see what its smaller weights cost."""
    problems = [
        f"{option} must be at least {least}, got {value}"
        for option, value, least in (("samples", samples, 1), ("orders", orders, 0), ("texts", texts, 1))
        if value is not None and value < least
    ]
    if problems:
        raise ValueError("; ".join(problems))
    windows = _windows(model, documents)
    if not windows:
        raise ValueError("there is no text to score: every document is empty")
    count = min(texts or len(windows), len(windows))
    windows = [windows[number * len(windows) // count] for number in range(count)]
    num_bytes = sum(_bytes_of(model, window) for window in windows)
    exact = model.algorithm.bound_is_exact
    plans: list[tuple[likelihood.Kind, int]] = [("exact", 1) if exact else ("NELBO", samples)]
    if orders and model.algorithm.one_pass and not exact:
        plans.append(("importance-weighted bound", orders))
    rows = []
    for kind, draws in plans:
        batches = track(list(_batches(model, windows)), description=f"{name} · {kind}", console=console, transient=True)
        network = model.writer if as_written else model.denoiser
        found = likelihood.estimate(network, model.algorithm, batches, kind=kind, samples=draws, seed=seed)
        rows.append(Row(name=name, method=repr(model.algorithm), estimate=found, num_bytes=num_bytes))
    return rows


def table(rows: Sequence[Row]) -> Table:
    """The rows as a table for the terminal."""
    shown = Table(title="likelihood", title_justify="left")
    for label, justify in (("model", "left"), ("measure", "left"), ("nats/token", "right"), ("±", "right")):
        shown.add_column(label, justify=justify)  # type: ignore[arg-type]
    for label in ("perplexity", "bits/byte", "tokens"):
        shown.add_column(label, justify="right")
    for row in rows:
        found = row.estimate
        many = f" of {found.samples}" if found.samples > 1 else ""
        bound = "" if found.kind == "exact" else "≤ "
        shown.add_row(
            row.name,
            f"{found.kind}{many}",
            f"{found.nats_per_token:.4f}",
            f"{found.standard_error:.4f}",
            f"{bound}{found.perplexity:.2f}",
            f"{bound}{found.bits_per_byte(row.num_bytes):.4f}",
            f"{found.num_tokens:,}",
        )
    return shown


def _windows(model: Model, documents: Sequence[str]) -> list[list[int]]:
    end = model.tokenizer.end_id
    windows = []
    for document in filter(None, documents):
        ids = [*model.tokenizer.encode(document), end]
        windows += [ids[at : at + model.length] for at in range(0, len(ids), model.length)]
    return windows


def _bytes_of(model: Model, window: list[int]) -> int:
    """Bytes that a window writes. A character cut in two by the window's edge counts by its bytes in each."""
    return model.tokenizer.num_bytes([token for token in window if token != model.tokenizer.end_id])


def _batches(model: Model, windows: Sequence[list[int]]) -> Iterator[Batch]:
    """Windows in batches, each padded to the model's length."""
    for at in range(0, len(windows), _AT_ONCE):
        part = windows[at : at + _AT_ONCE]
        tokens = torch.full((len(part), model.length), model.tokenizer.end_id)
        valid = torch.zeros(len(part), model.length, dtype=torch.bool)
        for row, window in enumerate(part):
            tokens[row, : len(window)] = torch.tensor(window)
            valid[row, : len(window)] = True
        yield Batch(tokens=tokens, given=torch.zeros_like(valid), valid=valid)
