"""Tasks from the Epistle to the Hebrews (King James), which `esolm-shakespeare` never saw in training.

Each function is the data of the task of its name, from the text that comes with the package.
"""

import itertools
import random
import re
from typing import Any

from datasets import Dataset

from esolm import corpus

_LINE = re.compile(r"^\d+ (.*\w\w[.?!])$", re.MULTILINE)  # a verse that ends with its sentence


def endings(**_: Any) -> dict[str, Dataset]:
    """Verses cut in the middle: the true second half among those of three other verses."""
    halves = [_halves(verse) for verse in _verses()]
    rng, rows = random.Random(0), []
    for number, (first, second) in enumerate(halves):
        others = [other for n, (_, other) in enumerate(halves) if n != number]
        rows.append(_choice(first, second, rng.sample(others, 3), rng))
    return {"test": Dataset.from_list(rows)}


def shuffled(**_: Any) -> dict[str, Dataset]:
    """Verses cut in the middle: the true second half among three of the same words in another order."""
    rng, rows = random.Random(0), []
    for first, second in map(_halves, _verses()):
        words = second[:-1].split(" ")
        others = [" ".join(rng.sample(words, len(words))) + second[-1] for _ in range(3)]
        rows.append(_choice(first, second, others, rng))
    return {"test": Dataset.from_list(rows)}


def last_words(**_: Any) -> dict[str, Dataset]:
    """Two verses and the last word of the second, without its full stop."""
    verses = _verses()
    rows = []
    for before, verse in itertools.pairwise(verses):
        text, _, word = verse[:-1].rpartition(" ")
        rows.append({"text": f"{before}\n{text}", "word": word})
    return {"test": Dataset.from_list(rows)}


def chapters(**_: Any) -> dict[str, Dataset]:
    """The thirteen chapters, as they stand."""
    parts = re.split(r"CHAPTER \d+\n\n", _book())[1:]
    return {"test": Dataset.from_list([{"page": part.strip()} for part in parts])}


def _book() -> str:
    (text,) = [text for text in corpus.documents(corpus.shipped("kjv")) if text.lstrip().startswith("HEBREWS\n")]
    return text


def _verses() -> list[str]:
    return [verse for verse in _LINE.findall(_book()) if len(verse.split()) >= 8]


def _halves(verse: str) -> tuple[str, str]:
    words = verse.split(" ")
    return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def _choice(first: str, second: str, others: list[str], rng: random.Random) -> dict[str, Any]:
    """A question whose answer stands at a random place."""
    answer = rng.randrange(4)
    return {"first": first, "choices": [*others[:answer], second, *others[answer:]], "answer": answer}
