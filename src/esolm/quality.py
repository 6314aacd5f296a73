"""How good written texts are, beside how likely: variety, repetition, and how close they lie to real ones.

    entropy        of the frequencies of a text's tokens, in nats, averaged over texts      as published; low: collapsed
    distinct-n     different runs of n tokens over all runs, of all texts together
    repetition-n   share of a text's runs of n tokens that occurred in it before, averaged
    MAUVE          area under the divergence curve of two clouds of features (arXiv:2102.01454): 1 is no difference

Functions of tokens and of features: they know no model. A generative perplexity says little without an entropy beside
it: a text that repeats itself is likely.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

FEWEST_FOR_MAUVE = 50  # texts on each side: its clusters are a tenth of them, and fewer than five say nothing

Tokens = Sequence[int]


def entropy(texts: Sequence[Tokens]) -> float:
    """Unigram entropy in nats of each text, averaged (MDLM, arXiv:2406.07524, and the papers after it)."""
    _check(texts)
    return float(np.mean([_entropy(text) for text in texts]))


def distinct(texts: Sequence[Tokens], n: int) -> float:
    """Different runs of `n` tokens over all runs, in (0, 1]; NaN where no text is that long."""
    _check(texts)
    runs = [run for text in texts for run in _runs(text, n)]
    return len(set(runs)) / len(runs) if runs else math.nan


def repetition(texts: Sequence[Tokens], n: int) -> float:
    """Share of the runs of `n` tokens of a text that it held before, in [0, 1), averaged over texts that are that long;
    NaN where none is."""
    _check(texts)
    shares = [1 - len(set(runs)) / len(runs) for text in texts if (runs := _runs(text, n))]
    return float(np.mean(shares)) if shares else math.nan


def mauve(
    ours: Float32[np.ndarray, "text feature"], real: Float32[np.ndarray, "real feature"], *, seed: int = 0
) -> float:
    """MAUVE of two sets of features, by the authors' library (extra `eval`; its licence is the GPL, so the core never
    imports it). It grows with the number of texts: compare figures of the same numbers only. ValueError for too few."""
    refuse_mauve(len(ours), len(real))
    from mauve import compute_mauve

    found = compute_mauve(p_features=ours, q_features=real, seed=seed, verbose=False)
    return float(found.mauve)


def pieces(documents: Sequence[str], like: Sequence[str]) -> list[str]:
    """Real texts to compare with: as many as `like`, as long as those on average, evenly spread over the documents.
    ValueError if there is not that much real text."""
    size = max(1, round(sum(map(len, like)) / len(like)))
    cut = [document[at : at + size] for document in documents for at in range(0, len(document) - size + 1, size)]
    if len(cut) < len(like):
        raise ValueError(
            f"the real text has {len(cut)} pieces of {size} characters, fewer than the {len(like)} texts: add some"
        )
    return [cut[number * len(cut) // len(like)] for number in range(len(like))]


def refuse_mauve(ours: int, real: int) -> None:
    """ValueError, before anything is computed for it, where MAUVE cannot be had: too few texts, or no package."""
    if min(ours, real) < FEWEST_FOR_MAUVE:
        raise ValueError(
            f"MAUVE needs at least {FEWEST_FOR_MAUVE} texts on each side, got {ours} and {real}: "
            "write more, or leave it out"
        )
    try:
        import mauve  # noqa: F401
    except ImportError:
        raise ValueError('MAUVE needs the extra: pip install "esolm[eval]", or leave the real texts out') from None


def _check(texts: Sequence[Tokens]) -> None:
    if not texts:
        raise ValueError("there is no text to measure")
    for number, text in enumerate(texts):
        if not len(text):
            raise ValueError(f"text {number} is empty: leave it out")


def _entropy(text: Tokens) -> float:
    shares = np.array(list(Counter(text).values())) / len(text)
    return float(-(shares * np.log(shares)).sum())


def _runs(text: Tokens, n: int) -> list[tuple[int, ...]]:
    if n < 1:
        raise ValueError(f"runs have at least 1 token, got n = {n}")
    return list(zip(*(text[start:] for start in range(n)), strict=False))
