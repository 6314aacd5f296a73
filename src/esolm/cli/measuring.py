"""`esolm evaluate`, `esolm info`, `esolm verify` and `esolm demo`."""

from pathlib import Path

import tyro

from esolm.cli.terminal import console, loaded, print_json, say


def evaluate(
    checkpoints: tyro.conf.Positional[tuple[Path, ...]],
    data: str = "shakespeare",
    field: str = "text",
    samples: int = 4,
    orders: int = 0,
    texts: int | None = 256,
    seed: int = 0,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Likelihoods of a text under models, on one scale: nats a token, bits a byte, perplexity.

    Examples:

      esolm evaluate runs/first --data held-out.txt
      esolm evaluate runs/ar runs/mdlm runs/esolm --data held-out.txt --orders 10

    In Python: evaluate.evaluate(model, documents, samples=4).

    Args:
        checkpoints: Runs' folders or single steps.
        data: A text file, a folder, JSON lines, Parquet, hf:NAME, or the shipped "shakespeare".
        field: Field of the text in JSON lines, Parquet or a data set.
        samples: Draws of the NELBO for each text.
        orders: Also the importance-weighted bound of this many orders (Eso-LM).
        texts: At most this many windows of text; all, with --texts None.
        seed: Of the draws.
        device: auto, cpu, cuda, ...
        json: Print JSON lines instead of a table.
    """
    from esolm import corpus, prepare
    from esolm.evaluate import evaluate as measure
    from esolm.evaluate import table

    if not checkpoints:
        raise ValueError("give at least one checkpoint: esolm evaluate CHECKPOINT --data FILE")
    documents = list(corpus.documents(prepare.located(data), field=field))
    rows = []
    for path in checkpoints:
        model = loaded(path, "float32", device)
        rows += measure(
            model, documents, name=str(path), samples=samples, orders=orders, texts=texts, seed=seed, console=console()
        )
    if json:
        for row in rows:
            print_json(row.values())
    else:
        console(stderr=False).print(table(rows))


def info(checkpoint: tyro.conf.Positional[Path], json: bool = False) -> None:
    """What a checkpoint is: method, size, how it was trained, what its products run on here.

    Examples:

      esolm info runs/first

    In Python: esolm.load("runs/first").info().

    Args:
        checkpoint: A run's folder or one step of it.
        json: Print JSON.
    """
    told = loaded(checkpoint, "auto", "cpu").info()
    if json:
        print_json(told)
        return
    width = max(map(len, told))
    for label, value in told.items():
        print(f"{label:<{width}}  {value}")


def verify(checkpoint: tyro.conf.Positional[Path]) -> None:
    """Check a checkpoint byte for byte.

    Examples:

      esolm verify runs/first

    In Python: checkpoint.verify(checkpoint.newest(folder)).

    Args:
        checkpoint: A run's folder or one step of it.
    """
    from esolm import checkpoint as checkpoints

    path = checkpoint if checkpoints.is_step(checkpoint) else checkpoints.newest(checkpoint)
    if path is None:
        raise checkpoints.CheckpointError(f"no checkpoint in {checkpoint}; expected a folder like step-000001000 in it")
    checkpoints.verify(path)
    say(f"{path} is whole")


def demo(out: Path = Path("out/demo"), minutes: float = 6.0, seed: int = 0) -> None:
    """Train a small Eso-LM on Shakespeare, watch it write, and leave a report to open.

    Examples:

      esolm demo
      esolm demo --minutes 20 --out out/longer

    In Python: demo.run(Path("out/demo"), minutes=6).

    Args:
        out: Folder for the run and report.html.
        minutes: Time for training.
        seed: Of everything.
    """
    from esolm.demo import run

    run(out, minutes=minutes, seed=seed, console=console(stderr=False))
