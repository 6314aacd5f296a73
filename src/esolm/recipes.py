"""Named runs, as functions that return them: settings to read, to call and to change with `dataclasses.replace`.

    run = recipes.shakespeare(EsoLM(alpha_0=0.25), vocab_size=2048)

`lm1b` and `owt` are the paper's (arXiv:2506.01928, section 5 and appendix C; the same for every method). They read no
data; see `recipes.method` for the five methods by name.
"""

from dataclasses import fields, replace

from esolm import plain
from esolm.algorithms import AR, BD3LM, MDLM, Algorithm, EsoLM
from esolm.denoiser import Config
from esolm.optim import Config as Optim
from esolm.optim import Schedule
from esolm.train import Run

METHODS = ("ar", "mdlm", "bd3lm", "esolm-a", "esolm-b")


def method(name: str, alpha_0: float | None = None, block_size: int | None = None) -> Algorithm:
    """One of the five methods, or one of the user's own by the name of its class (see `own`). ValueError for an option
    that the method does not have."""
    options = {key: value for key, value in (("alpha_0", alpha_0), ("block_size", block_size)) if value is not None}
    own = plain.classes(Algorithm)  # type: ignore[type-abstract]
    if name not in METHODS and name not in own:
        names = (*METHODS, *sorted(own.keys() - {"AR", "BD3LM", "EsoLM", "MDLM"}))
        hint = plain.nearest(name, names)
        raise ValueError(f"there is no method {name!r}{hint}; there are {', '.join(names)}, and your own: --with FILE")
    cls, fixed = _BUILT_IN.get(name, (own.get(name), {}))
    assert cls is not None
    for key in options:
        if key not in {field.name for field in fields(cls)}:
            raise ValueError(f"{name} has no {key.replace('_', ' ') if key == 'block_size' else key}{_WHO[key]}")
    return cls(**fixed, **options)


_BUILT_IN: dict[str, tuple[type[Algorithm], dict[str, str]]] = {
    "ar": (AR, {}),
    "mdlm": (MDLM, {}),
    "bd3lm": (BD3LM, {}),
    "esolm-a": (EsoLM, {"variant": "A"}),
    "esolm-b": (EsoLM, {"variant": "B"}),
}
_WHO = {
    "alpha_0": "; esolm-a and esolm-b have: leave it out or choose one of them",
    "block_size": "; bd3lm has: leave it out or choose that",
}


def demo(algorithm: Algorithm, vocab_size: int) -> Run:
    """A few minutes on two cores: enough for Shakespeare's words and the shape of his pages. 2.4 M parameters and the
    embeddings; a larger network learns less in so few steps (docs/log.md)."""
    return Run(
        algorithm=algorithm,
        network=Config(vocab_size=vocab_size, length=128, width=256, layers=3, heads=4),
        optim=Optim(
            schedule=Schedule(peak=1.5e-3, warmup=0.2, decay="linear"),
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
    """What the family of docs/results.md has in common: some ten minutes of one core each, about one epoch of the
    shipped classics. Small batches, so that there are many steps, and a long warm-up: with a short one masked models
    stay on their first plateau (docs/results.md). Otherwise much as the demonstration."""
    base = demo(algorithm, vocab_size)
    return replace(
        base,
        optim=replace(base.optim, schedule=Schedule(peak=1.5e-3, warmup=0.2, decay="linear")),
        network=Config(vocab_size=vocab_size, length=128, width=192, layers=3, heads=3),
        num_steps=3200,
        batch_size=8,
        validate_every=400,
        validation_texts=512,
        save_every=200,
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
