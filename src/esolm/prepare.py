"""From a name of some text to what training reads: documents, a tokenizer, tokens on disk, and two loaders.

    Source(data="books/")  ->  runs/x/tokenizer.json, runs/x/data/  ->  Text.training(length), Text.validation(length)

A source is recorded in every checkpoint, so that `--resume` needs the run's folder only. It trains no model.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from esolm import checkpoint, corpus, outside, plain
from esolm.corpus import Meter
from esolm.data import Loader
from esolm.denoiser import Config
from esolm.shards import TokenData, tokenize, tokenize_pairs
from esolm.tokenizer import Tokenizer
from esolm.train import Run

_BYTES = 258  # ids of a byte tokenizer: 256 bytes, end-of-text, mask
_LEARNED_FROM = 10**8  # characters that a new tokenizer is trained on at most
_PART = 2**20  # characters of a document that it is shown at once: the library holds 256 of them


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where texts come from, and which share of the documents is held out."""

    data: str
    pairs: bool = False
    field: str | None = None
    answer: str = "answer"
    validation: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.validation < 1:
            raise ValueError(f"validation is the share held out and must lie in (0, 1), got {self.validation}")
        if any("\ud800" <= letter <= "\udfff" for letter in self.data):
            raise ValueError(f"the name {self.data!a} is not UTF-8, so that no checkpoint could hold it: rename it")

    def documents(self, meter: Meter | None = None) -> Iterator[str]:
        """Whole texts. For pairs, prompt and answer one after the other."""
        if self.pairs:
            return itertools.chain.from_iterable(self.question_and_answer(meter))
        return corpus.documents(located(self.data), field=self.first_field, meter=meter)

    def question_and_answer(self, meter: Meter | None = None) -> Iterator[tuple[str, str]]:
        return corpus.pairs(located(self.data), prompt=self.first_field, answer=self.answer, meter=meter)

    @property
    def first_field(self) -> str:
        """The field of the text, or of the prompt."""
        return self.field or ("prompt" if self.pairs else "text")

    def origin(self) -> dict[str, Any]:
        """What a checkpoint records, to be read by `resumed`."""
        data: dict[str, Any] = plain.to_plain(self)
        return data

    def text(self) -> dict[str, Any]:
        """What of it decides on the tokens: which are held out, and by what seed, does not."""
        fields = [self.first_field, self.answer] if self.pairs else [self.first_field]
        return {"data": self.data, "pairs": self.pairs, "fields": fields}


@dataclass(frozen=True, kw_only=True)
class Text:
    """Tokens to learn from and tokens held out."""

    tokenizer: Tokenizer
    learned: TokenData
    held_out: TokenData

    def training(self, length: int, seed: int = 0) -> Loader:
        return Loader(self.learned, length=length, seed=seed)

    def validation(self, length: int) -> Loader:
        return Loader(self.held_out, length=length)


def prepare(
    source: Source,
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = 4096,
    console: Console | None = None,
) -> Text:
    """Tokens of a source, kept in `folder/data`, and which of them are held out. See `tokens`."""
    known, data = tokens(source, folder, tokenizer=tokenizer, vocab_size=vocab_size, console=console)
    learned, held_out = data.split(source.validation, seed=source.seed)
    return Text(tokenizer=known, learned=learned, held_out=held_out)


def tokens(
    source: Source,
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = 4096,
    console: Console | None = None,
) -> tuple[Tokenizer, TokenData]:
    """Tokenize a source into `folder/data`, with the tokenizer given, or the one already in the folder, or a BPE of
    `vocab_size` learned from the source (258: bytes). What is there already is used again, unless the text has changed.
    DataError for bad input."""
    kept = folder / "tokenizer.json"
    if tokenizer is None:
        tokenizer = Tokenizer.load(kept) if kept.exists() else _learned(source, vocab_size, console)
    place = located(source.data)
    meter = Meter(place) if not (folder / "data").exists() else None
    options: dict[str, Any] = {
        "source": plain.render(source.text()),
        "fingerprint": corpus.fingerprint(place),
        "console": console,
        "meter": meter,
    }
    if source.pairs:
        data = tokenize_pairs(source.question_and_answer(meter), tokenizer, folder / "data", **options)
    else:
        data = tokenize(source.documents(meter), tokenizer, folder / "data", **options)
    tokenizer.save(kept)
    return tokenizer, data


def _learned(source: Source, vocab_size: int, console: Console | None) -> Tokenizer:
    """Bytes, or a BPE learned from the beginning of a source."""
    if vocab_size == _BYTES:
        return Tokenizer.bytes()
    with nullcontext() if console is None else console.status(f"learning a vocabulary of {vocab_size:,} from the text"):
        return Tokenizer.train(_beginning(source.documents()), vocab_size)


def _beginning(texts: Iterable[str]) -> Iterator[str]:
    """The first `_LEARNED_FROM` characters of some texts, in parts."""
    left = _LEARNED_FROM
    for text in texts:
        for at in range(0, len(text), _PART):
            part = text[at : at + min(_PART, left)]
            yield part
            left -= len(part)
            if not left:
                return


def located(data: str) -> str | Path:
    """A source's name, or the place of a corpus that is shipped."""
    return corpus.shipped(data) if data in corpus.SHIPPED and not Path(data).exists() else data


def tokenizer_of(path: Path | None, start: Path | None) -> Tokenizer | None:
    """The tokenizer of a file, or of the checkpoint that a run begins with."""
    if path is not None:
        return Tokenizer.load(path)
    if start is not None:
        return Tokenizer.from_json(checkpoint.load(start, optimizer=False).tokenizer_json)
    return None


def like(run: Run, start: Path) -> Run:
    """The run with the network of a checkpoint, which it is to begin with."""
    saved = checkpoint.load(start, optimizer=False)
    network = plain.from_plain(Config, saved.config["network"])
    return replace(run, network=replace(network, dropout=run.network.dropout))


def resumed(folder: Path) -> tuple[Run, Source]:
    """The run in a folder and its source. CheckpointError or ValueError if there is none to go on with."""
    saved = checkpoint.load(folder, optimizer=False)
    origin: Mapping[str, Any] = saved.state.get("origin") or {}
    if not origin:
        raise ValueError(f"the run in {folder} does not say where its data came from: resume it from Python")
    outside.check(saved.config)
    return plain.from_plain(Run, saved.config["run"]), plain.from_plain(Source, origin)


def held_out(path: Path) -> list[str]:
    """The documents that a run did not learn from, out of the tokens in its folder. DataError or CheckpointError if
    they are not there."""
    folder = path.parent if checkpoint.is_step(path) else path
    if not checkpoint.load(path, optimizer=False, digests=False).state.get("origin"):
        raise ValueError(f"{path} does not say what it learned from: give a text to score (--data)")
    _, source = resumed(folder)
    _, found = TokenData.open(folder / "data").split(source.validation, seed=source.seed)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return [tokenizer.decode(found.document(number).tolist()) for number in range(found.num_documents)]
