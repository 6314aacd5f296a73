"""`esolm plan`."""

from typing import Annotated, Literal

import tyro

from esolm.cli.parsing import Flag, Maybe
from esolm.cli.settings import Settings, changed, keys, run_of
from esolm.cli.terminal import console, print_json

_SETTINGS = Settings()


def plan(
    method: Annotated[Settings, tyro.conf.arg(name="")] = _SETTINGS,
    ranks: int = 1,
    memory: Maybe[str] = None,
    reserve: Maybe[float] = None,
    vocab_size: int = 4096,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: Flag = False,
) -> None:
    """What a run takes of memory, and the largest micro batch that fits. It allocates nothing of it.

    Examples:

      esolm plan
      esolm plan --recipe owt --vocab-size 50258 --device cuda --ranks 8 --memory 80GB
      esolm plan --recipe owt --vocab-size 50258 --device cuda --ranks 8 --memory 24GB --set shard=true recompute=true

    In Python:

      from esolm import planning

      found = planning.plan(recipes.shakespeare(EsoLM(), vocab_size=4096), ranks=4, memory=80e9, device="cuda")

    Args:
        method: What is trained, as `esolm train` takes it.
        ranks: Processes that train together.
        memory: What each rank has, as 80GB or 24GiB; left out, what is free on the device, which must be here.
        reserve: Share of it that stays free; left out, a third on a CPU (malloc leaves holes), a tenth on a GPU.
        vocab_size: Ids of the tokenizer, the mask included.
        device: What it trains on, here or elsewhere: auto, cpu, cuda.
        json: Print JSON, in bytes, instead of a table.
    """
    from esolm import planning

    if "help" in method.set:
        print("\n".join(f"{key}={value}" for key, value in keys(run_of(method)).items()))
        return
    place = _device(device)
    room = planning.size(memory) if memory is not None else _free(place)
    run = changed(run_of(method, vocab_size), method)
    found = planning.plan(run, memory=room, ranks=ranks, device=place, reserve=reserve)
    if json:
        print_json(found.values())
        return
    out = console(stderr=False)
    out.print(planning.table(found))
    cache = "no cache" if not found.cache else f"{found.cache / 1e6:.1f} MB of keys and values"
    copy = f"; {found.host / 1e9:.2f} GB of the machine's memory for saving meanwhile" if found.host else ""
    out.print(f"{found.parameters:,} parameters; to write a text: {cache}{copy}", highlight=False)
    whole = " (no more texts are fed at once)" if found.best.micro_batch == found.texts else ""
    used, of = found.best.total / 1e9, found.memory / 1e9
    out.print(f"largest micro batch: {found.best.micro_batch}{whole} (uses {used:.2f} of {of:.2f} GB)", highlight=False)


def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _free(device: str) -> float:
    """Bytes that the device has left. ValueError if it is not here."""
    import torch

    from esolm.memory import available

    left = None if device == "cuda" and not torch.cuda.is_available() else available(torch.device(device))
    if left is None:
        raise ValueError(f"--memory is needed, as in --memory 80GB: nobody here can tell what a {device} device has")
    return float(left)
