"""Text to ids and back: bytes, a byte-level BPE learned here, or any `tokenizer.json`, with end-of-text and mask.

    ids   0 ... pieces of text ... [end-of-text] ... [mask]      the mask is always the last id

Text never yields a special id, whatever it says: "<|mask|>" in a text is eight ordinary characters. The `tokenizers`
library does the work; this file adds the two special ids and errors that teach. It reads no corpora.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from esolm.plain import FileError

END, MASK = "<|endoftext|>", "<|mask|>"
KNOWN_ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")
_GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_PIECE = 2**12  # characters encoded at a time
_TOGETHER = 256  # pieces encoded together: enough for every core, and what is held stays small
_CUT = re.compile(r"(?<=\S)\n(?=\S)")  # other white space is read together with its neighbours: "\n\n" may be one token
_LINES = ("Words, two.\n", "3 (four)\n", "«é»\n", "last")  # probes


class Tokenizer:
    """Ids of texts. Made by `bytes`, `train`, `load` or `from_json`.

    `end_id` is None where an imported tokenizer has a mask but no end-of-text: its network knows no id for one.
    """

    def __init__(self, backend: Backend) -> None:
        vocab = backend.get_vocab(with_added_tokens=True)
        end = next((name for name in KNOWN_ENDS if name in vocab), None if MASK in vocab else END)
        if end is not None:
            backend.add_special_tokens([AddedToken(end, special=True, normalized=False)])
        backend.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])
        backend.encode_special_tokens = True  # special tokens spelled out in a text are text
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        vocab = backend.get_vocab(with_added_tokens=True)
        self.end_id: int | None = None if end is None else vocab[end]
        self.mask_id, highest = vocab[MASK], max(vocab.values())
        if self.mask_id != highest:
            raise ValueError(
                f"the mask must be the last id, but it is {self.mask_id} and the last is {highest}: "
                f"remove {MASK} from the tokenizer, and it is added where it belongs"
            )

    @staticmethod
    def bytes() -> "Tokenizer":
        """One id for each byte: 0 to 255, then end-of-text 256 and mask 257."""
        letters = {letter: byte for byte, letter in _byte_letters().items()}
        return Tokenizer(_byte_level(models.BPE(vocab=letters, merges=[])))

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE of `vocab_size` ids, end-of-text and mask included. The same texts give the same ids.

        ValueError if `vocab_size` is below 258 or the texts have too few pairs for it.
        """
        if vocab_size < 258:
            raise ValueError(f"vocab_size must be at least 258 (256 bytes, end-of-text, mask), got {vocab_size}")
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        found = Tokenizer(backend)
        if found.vocab_size != vocab_size:
            raise ValueError(
                f"the texts have pairs for {found.vocab_size} ids only, not {vocab_size}: "
                f"choose vocab_size {found.vocab_size} or give more text"
            )
        return found

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """From a tokenizer.json, from GPT-2's two files (encoder.json and vocab.bpe, or vocab.json and merges.txt: name
        either), or from a folder that holds one or the others.

        FileError if there is none or it cannot be read.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        pairs = [pair for pair in _GPT2_FILES if path.is_dir() or path.name in pair]
        if path.is_dir() and (path / "tokenizer.json").is_file():
            path, pairs = path / "tokenizer.json", []
        for encoder, merges in pairs:
            if (folder / encoder).is_file() and (folder / merges).is_file():
                return _gpt2(folder / encoder, folder / merges)
        if path.is_dir() or (pairs and path.is_file()):
            files = ", or ".join(" and ".join(pair) for pair in pairs)
            raise FileError(f"there is no tokenizer in {folder}: it needs tokenizer.json, or {files}")
        if not path.is_file():
            raise FileError(f"there is no tokenizer at {path}: give a tokenizer.json or its folder")
        try:
            return Tokenizer.from_json(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as problem:
            raise FileError(
                f"cannot read the tokenizer {path}: {problem}; give a tokenizer.json or its folder"
            ) from None

    @staticmethod
    def from_json(text: str) -> "Tokenizer":
        """From what `to_json` gave, or any other tokenizer.json. FileError if it is not one."""
        try:
            backend = Backend.from_str(text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as problem:  # the library raises plain Exception, and panics are not even that
            raise FileError(f"this is no tokenizer.json: {problem}") from None
        return Tokenizer(backend)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy reads special tokens spelled out in a text as text, which the library's own copies forget."""
        return Tokenizer.from_json, (self.to_json(),)

    def to_json(self) -> str:
        """The whole tokenizer as JSON, special ids included."""
        text: str = self._backend.to_str()
        return text

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file, whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f".saving-{path.name}-{os.getpid()}")
        try:
            temporary.write_text(self.to_json(), encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @property
    def vocab_size(self) -> int:
        """Number of ids, end-of-text and mask included."""
        return self.mask_id + 1

    @property
    def pad_id(self) -> int:
        """An id to fill up texts with; nobody reads it."""
        return 0 if self.end_id is None else self.end_id

    @cached_property
    def digest(self) -> str:
        """sha256 of the tokenizer's JSON: equal digests, equal ids."""
        return hashlib.sha256(json.dumps(json.loads(self.to_json()), sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without end-of-text. Never a special id. ValueError for half a surrogate pair or no str."""
        try:
            return self._ordinary(text, self._backend.encode(text, add_special_tokens=False).ids)
        except TypeError:  # what the library says of a str that has no UTF-8
            raise ValueError(_unpaired([text])) from None
        except Exception as problem:  # the library raises plain Exception: a piece that has no id
            raise ValueError(f"the tokenizer has no ids for this text: {problem}") from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on all cores. See `encode`."""
        try:
            found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            raise ValueError(_unpaired(texts)) from None
        return [self._ordinary(text, encoding.ids) for text, encoding in zip(texts, found, strict=True)]

    def encode_arrays(self, texts: Iterable[str], dtype: str) -> Iterator[np.ndarray]:
        """Ids of each text as an array. Texts may be huge: they are encoded in pieces where that changes no id."""
        pieces = [list(_pieces(text)) if self._lines_are_apart else [text] for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        batches = (self.encode_batch(flat[at : at + _TOGETHER]) for at in range(0, len(flat), _TOGETHER))
        found = (np.array(ids, dtype=dtype) for batch in batches for ids in batch)
        for parts in pieces:
            yield np.concatenate(list(islice(found, len(parts))))

    def decode(self, ids: Sequence[int], mask: str = "\u2591") -> str:
        """The text of ids; masks are shown as `mask`, end-of-text is left out, broken UTF-8 becomes U+FFFD.

        ValueError for an id out of range.
        """
        self._check(ids)
        kept = [token for token in ids if token != self.end_id]
        parts = []
        for masked, run in groupby(kept, key=lambda token: token == self.mask_id):
            tokens = list(run)
            parts.append(mask * len(tokens) if masked else self._backend.decode(tokens, skip_special_tokens=False))
        return "".join(parts)

    def num_bytes(self, ids: Sequence[int]) -> int:
        """Bytes of text that ids stand for, special ids left out. A character cut in two counts by its bytes."""
        self._check(ids)
        kept = [token for token in ids if token not in (self.end_id, self.mask_id)]
        if isinstance(self._backend.decoder, decoders.ByteLevel):  # a piece has one letter for each byte
            return sum(len(self._backend.id_to_token(token) or "") for token in kept)
        return len(self.decode(kept).encode())

    @cached_property
    def _lines_are_apart(self) -> bool:
        """May a text be cut behind a line break that stands alone, its parts encoded apart, and the ids be the same?"""
        before = self._backend.pre_tokenizer
        if before is None or self._backend.normalizer is not None:
            return False
        apart = [piece for line in _LINES for piece, _ in before.pre_tokenize_str(line)]
        return apart == [piece for piece, _ in before.pre_tokenize_str("".join(_LINES))]

    def _ordinary(self, text: str, ids: list[int]) -> list[int]:
        """The ids of a text. Where the model itself has a piece spelled like a special token (T5 does), the text is
        encoded in parts that cut the name in two."""
        ends = (self.mask_id,) if self.end_id is None else (self.end_id, self.mask_id)
        if not set(ends) & set(ids):
            return ids
        special = (self._backend.id_to_token(token) or "" for token in ends)
        names = [name for name in special if name in text]
        if not names:
            raise ValueError("the tokenizer turns unknown pieces into end-of-text: choose one that has an id for them")
        inside = "|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names)
        parts = [self._backend.encode(part, add_special_tokens=False).ids for part in re.split(inside, text)]
        return [token for part in parts for token in part]

    def _check(self, ids: Sequence[int]) -> None:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"id {token} is not in the vocabulary: ids lie in [0, {self.vocab_size})")


def _pieces(text: str) -> Iterator[str]:
    """A text cut into pieces of about `_PIECE` characters, behind line breaks that stand alone."""
    at = 0
    while cut := _CUT.search(text, at + _PIECE):
        yield text[at : cut.end()]
        at = cut.end()
    yield text[at:]


def _gpt2(encoder: Path, merges: Path) -> Tokenizer:
    try:
        return Tokenizer(_byte_level(models.BPE.from_file(str(encoder), str(merges))))
    except Exception as problem:  # the library raises plain Exception
        raise FileError(f"cannot read the tokenizer {encoder} with {merges.name}: {problem}") from None


def _unpaired(texts: Sequence[str]) -> str:
    """What is wrong with texts that the library refuses."""
    for text in texts:
        if not isinstance(text, str):
            return f"a text must be a str, got {type(text).__name__}"
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            half = f"U+{ord(text[problem.start]):04X}"
            return f"character {problem.start} is half a surrogate pair ({half}), which is no text: remove it"
    raise AssertionError("the library refuses what has UTF-8")


def _byte_level(model: models.BPE) -> Backend:
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level BPE (GPT-2): printable ones for themselves, the others from
    U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
