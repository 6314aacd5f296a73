"""From a name of some text to what training reads: documents, a tokenizer, tokens on disk, and two loaders.

    Source(data="books/")  ->  runs/x/tokenizer.json, runs/x/data/  ->  Text.training(length), Text.validation(length)
    Mixed(sources, weights)    one tokenizer,       runs/x/data-0/, data-1/ ...     the same, rows by weight

A source is recorded in every checkpoint, so that `--resume` needs the run's folder only. It trains no model.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from esolm import checkpoint, corpus, plain
from esolm.algorithms.algorithm import recorded
from esolm.corpus import Meter
from esolm.data import Loader, Mixture, check_weights
from esolm.denoiser import Config
from esolm.shards import TokenData
from esolm.tokenizer import Tokenizer
from esolm.tokenizing import tokenize, tokenize_pairs
from esolm.train import Run

_BYTES = 258  # ids of a byte tokenizer: 256 bytes, end-of-text, mask
_LEARNED_FROM = 10**8  # characters that a new tokenizer is trained on at most
_APART = 2**32  # between the seeds of the corpora of a mixture
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
class Mixed:
    """Several sources, and by what weights their rows are learned from: 3 and 1 take three rows of the first for each
    of the second, however large they are. Each holds out its own share of its documents."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        check_weights(self.weights, len(self.sources))

    def origin(self) -> dict[str, Any]:
        """What a checkpoint records, to be read by `resumed`."""
        data: dict[str, Any] = plain.to_plain(self)
        return data

    def places(self, folder: Path) -> list[tuple[Source, Path]]:
        """Each source, and where its tokens are kept."""
        return [(source, folder / f"data-{number}") for number, source in enumerate(self.sources)]


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


@dataclass(frozen=True, kw_only=True)
class MixedText:
    """Tokens of several sources. Training and validation both take rows by weight, so that the validation figure is of
    what is learned; one of a single corpus is told by `esolm evaluate --data`."""

    texts: tuple[Text, ...]
    weights: tuple[float, ...]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.texts[0].tokenizer

    def training(self, length: int, seed: int = 0) -> Mixture:
        """Each corpus goes through an order of its own, also where two are the same."""
        loaders = [text.training(length, seed + _APART * number) for number, text in enumerate(self.texts)]
        return Mixture(loaders, self.weights, seed=seed)

    def validation(self, length: int) -> Mixture:
        return Mixture([text.validation(length) for text in self.texts], self.weights)


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
    return _split(source, known, data)


def prepare_mixed(
    mixed: Mixed,
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = 4096,
    console: Console | None = None,
) -> MixedText:
    """The same for several sources, kept in `folder/data-0`, `folder/data-1` and so on. A tokenizer that is learned
    sees equal parts of all."""
    known, found = tokens_of_mixed(mixed, folder, tokenizer=tokenizer, vocab_size=vocab_size, console=console)
    texts = [_split(source, known, data) for source, data in zip(mixed.sources, found, strict=True)]
    return MixedText(texts=tuple(texts), weights=mixed.weights)


def _split(source: Source, tokenizer: Tokenizer, data: TokenData) -> Text:
    learned, held_out = data.split(source.validation, seed=source.seed)
    return Text(tokenizer=tokenizer, learned=learned, held_out=held_out)


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
    known = tokenizer or _kept_or_learned((source,), folder, vocab_size, console)
    data = _tokens(source, folder / "data", known, console)
    known.save(folder / "tokenizer.json")
    return known, data


def tokens_of_mixed(
    mixed: Mixed,
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = 4096,
    console: Console | None = None,
) -> tuple[Tokenizer, list[TokenData]]:
    """The same for several sources, each in a folder of its own, under one tokenizer."""
    known = tokenizer or _kept_or_learned(mixed.sources, folder, vocab_size, console)
    found = [_tokens(source, place, known, console) for source, place in mixed.places(folder)]
    known.save(folder / "tokenizer.json")
    return known, found


def _tokens(source: Source, folder: Path, tokenizer: Tokenizer, console: Console | None) -> TokenData:
    place = located(source.data)
    meter = Meter(place) if not folder.exists() else None
    options: dict[str, Any] = {
        "source": plain.render(source.text()),
        "fingerprint": corpus.fingerprint(place),
        "console": console,
        "meter": meter,
    }
    if source.pairs:
        return tokenize_pairs(source.question_and_answer(meter), tokenizer, folder, **options)
    return tokenize(source.documents(meter), tokenizer, folder, **options)


def _kept_or_learned(sources: Sequence[Source], folder: Path, vocab_size: int, console: Console | None) -> Tokenizer:
    """The tokenizer already in a folder, or bytes, or a BPE learned from the beginnings of sources."""
    kept = folder / "tokenizer.json"
    if kept.exists():
        return Tokenizer.load(kept)
    if vocab_size == _BYTES:
        return Tokenizer.bytes()
    beginnings = (_beginning(source.documents(), _LEARNED_FROM // len(sources)) for source in sources)
    with nullcontext() if console is None else console.status(f"learning a vocabulary of {vocab_size:,} from the text"):
        return Tokenizer.train(itertools.chain.from_iterable(beginnings), vocab_size)


def _beginning(texts: Iterable[str], left: int) -> Iterator[str]:
    """The first `left` characters of some texts, in parts."""
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


def resumed(folder: Path) -> tuple[Run, Source | Mixed]:
    """The run in a folder and its source or sources. CheckpointError or ValueError if there is none to go on with."""
    if not folder.is_dir():
        checkpoint.newest(folder)  # says so: a run that goes on is here, never on the Hub
    saved = checkpoint.load(folder, optimizer=False)
    origin: Mapping[str, Any] = saved.state.get("origin") or {}
    if not origin:
        raise ValueError(f"the run in {folder} does not say where its data came from: resume it from Python")
    recorded(saved.config["algorithm"])  # says what to do if it is not known
    return plain.from_plain(Run, saved.config["run"]), _source(origin)


def _source(origin: Mapping[str, Any]) -> Source | Mixed:
    return plain.from_plain(Mixed, origin) if "sources" in origin else plain.from_plain(Source, origin)


def held_out(path: Path) -> list[str]:
    """The documents that a run did not learn from, out of the tokens in its folder. DataError or CheckpointError if
    they are not there."""
    folder = path.parent if checkpoint.is_step(path) else path
    if not checkpoint.load(path, optimizer=False, digests=False).state.get("origin") or not path.exists():
        raise ValueError(
            f"{path} does not say what it learned from, or does not come with it: give a text to score (--data)"
        )
    _, source = resumed(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    places = [(source, folder / "data")] if isinstance(source, Source) else source.places(folder)
    parts = [_split(each, tokenizer, TokenData.open(place)).held_out for each, place in places]
    return [tokenizer.decode(part.document(at).tolist()) for part in parts for at in range(part.num_documents)]
