"""Named runs, as functions that return them: settings to read, to call and to change with `dataclasses.replace`.

    run = recipes.shakespeare(EsoLM(alpha_0=0.25), vocab_size=2048)

`lm1b` and `owt` are the paper's (arXiv:2506.01928, section 5 and appendix C; the same for every method). They read no
data; see `recipes.method` for the methods by name.
"""

from dataclasses import replace

from esolm import outside
from esolm.algorithms import AR, BD3LM, MDLM, Algorithm, EsoLM
from esolm.denoiser import Config
from esolm.optim import Config as Optim
from esolm.optim import Schedule
from esolm.plain import nearest
from esolm.train import Run

METHODS = ("ar", "mdlm", "bd3lm", "esolm-a", "esolm-b")


def method(name: str, alpha_0: float | None = None, block_size: int | None = None) -> Algorithm:
    """One of the five methods, or a class from outside that is known (see `outside`), with its defaults.

    ValueError for an option that the method does not have, and for a method that is not known.
    """
    if alpha_0 is not None and name not in ("esolm-a", "esolm-b"):
        raise ValueError(f"{name} has no alpha_0; esolm-a and esolm-b have")
    if block_size is not None and name != "bd3lm":
        raise ValueError(f"{name} has no block size; bd3lm has")
    if name == "ar":
        return AR()
    if name == "mdlm":
        return MDLM()
    if name == "bd3lm":
        return BD3LM(block_size=16 if block_size is None else block_size)
    if name in ("esolm-a", "esolm-b"):
        return EsoLM(variant="A" if name == "esolm-a" else "B", alpha_0=0.25 if alpha_0 is None else alpha_0)
    if name in outside.names():
        return outside.method(name)
    known = (*METHODS, *outside.names())
    raise ValueError(
        f"there is no method {name!r}{nearest(name, known)}; there are {', '.join(known)}, and one of your own with "
        "--with FILE.py (in Python: import it)"
    )


def demo(algorithm: Algorithm, vocab_size: int) -> Run:
    """A few minutes on two cores: enough for Shakespeare's words and the shape of his pages. 2.4 M parameters and the
    embeddings; a larger network learns less in so few steps (docs/log.md)."""
    return Run(
        algorithm=algorithm,
        network=Config(vocab_size=vocab_size, length=128, width=256, layers=3, heads=4),
        optim=Optim(
            schedule=Schedule(peak=1.5e-3, warmup=0.05, decay="linear"),
            betas=(0.9, 0.99),
            weight_decay=0.01,
            average=0.99,
        ),
        num_steps=1300,
        batch_size=16,
        validate_every=250,
        validation_texts=128,
        save_every=250,
        keep=1,
    )


def shakespeare(algorithm: Algorithm, vocab_size: int) -> Run:
    """A small model of a few megabytes of text: about an hour on two cores, minutes on a GPU. The same for each
    method, so that they can be compared."""
    return Run(
        algorithm=algorithm,
        network=Config(vocab_size=vocab_size, length=256, width=384, layers=6, heads=6, dropout=0.1),
        optim=Optim(
            schedule=Schedule(peak=1e-3, warmup=0.05, decay="cosine", final=0.1), weight_decay=0.01, average=0.999
        ),
        num_steps=3000,
        batch_size=32,
        validate_every=250,
        save_every=250,
    )


def family(algorithm: Algorithm, vocab_size: int) -> Run:
    """What the family of docs/results.md has in common: some six minutes of one core each, of the shipped classics. The
    network and the batch are the demonstration's."""
    return replace(
        demo(algorithm, vocab_size),
        num_steps=800,
        validate_every=400,
        validation_texts=512,
        save_every=100,
    )


def lm1b(algorithm: Algorithm, vocab_size: int) -> Run:
    """The paper's One Billion Words run: length 128, one million steps of 512 texts (appendix C)."""
    return _paper(algorithm, vocab_size, length=128, num_steps=1_000_000)


def owt(algorithm: Algorithm, vocab_size: int) -> Run:
    """The paper's OpenWebText run: length 1,024, 250 thousand steps of 512 texts (appendix C)."""
    return _paper(algorithm, vocab_size, length=1024, num_steps=250_000)


def _paper(algorithm: Algorithm, vocab_size: int, *, length: int, num_steps: int) -> Run:
    return Run(
        algorithm=algorithm,
        network=Config(vocab_size=vocab_size, length=length, width=768, layers=12, heads=12, dropout=0.1),
        optim=Optim(schedule=Schedule(peak=3e-4, warmup=2500), average=0.9999),
        num_steps=num_steps,
        batch_size=512,
        micro_batch=32,
        log_every=100,
        validate_every=5000,
        validation_texts=1024,
        save_every=5000,
    )
