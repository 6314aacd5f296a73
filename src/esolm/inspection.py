"""What a run looks at between its steps: texts held out, and texts that it writes. Neither changes the run.

The averaged weights are swapped in and out to the bit, and every number drawn is a function of a seed of its
own. Both are cut short when somebody asks the run to stop.
"""

from collections.abc import Iterable, Iterator

from esolm import likelihood
from esolm.algorithms.algorithm import Algorithm, Batch, Request
from esolm.denoiser import Denoiser
from esolm.likelihood import Estimate
from esolm.sample import Writer
from esolm.tokenizer import Tokenizer


class _CutShort(Exception):
    pass


def validation(
    network: Denoiser, algorithm: Algorithm, texts: Iterable[Batch], seed: int, stop: object
) -> Estimate | None:
    """The NELBO of texts, always with the same noise; None if it was cut short."""
    network.eval()
    try:
        return likelihood.estimate(network, algorithm, _until(stop, texts), seed=seed)
    except _CutShort:
        return None


def num_bytes(tokenizer: Tokenizer, texts: Iterable[Batch]) -> int:
    """Bytes of what is scored in texts, as `esolm evaluate` counts them."""
    rows = (row[scored] for batch in texts for row, scored in zip(batch.tokens, batch.scored, strict=True))
    return sum(tokenizer.num_bytes(row.tolist()) for row in rows)


def samples(network: Denoiser, algorithm: Algorithm, tokenizer: Tokenizer, count: int, stop: object) -> list[str]:
    """Texts of full length with the seeds 0, 1, ...: the same requests each time, so that texts can be compared as the
    run goes on. Nothing if it was cut short."""
    requests = [Request(length=network.config.length, seed=seed) for seed in range(count)]
    writer = Writer(network, algorithm, requests, end_id=tokenizer.end_id)
    while writer.active:
        if stop:
            return []
        writer.advance()
    return [tokenizer.decode(written.tokens.tolist()) for written in writer.texts()]


def _until(stop: object, texts: Iterable[Batch]) -> Iterator[Batch]:
    for batch in texts:
        if stop:
            raise _CutShort
        yield batch
