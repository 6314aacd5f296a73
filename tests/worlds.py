"""Processes that train together over gloo on this machine: forked from one that has imported torch, so that a world of
ranks costs what its steps cost.

A test gives a `script` that defines `live(name, **options)`; each rank of a world runs it, with the environment that
torchrun gives, and ends with the code that it returns.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_NURSERY = """if True:
    import json, os, signal, socket, sys, time, traceback
    from pathlib import Path
    import torch
    from rich.console import Console
    from esolm import checkpoint, guard, journal, optim, parts, ranks, train as training
    from esolm.algorithms import AR, MDLM, EsoLM
    from esolm.data import Loader
    from esolm.denoiser import Config
    from esolm.shards import TokenData
    from esolm.tokenizing import tokenize
    from esolm.tokenizer import Tokenizer

    import torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor  # what a step would import, in every rank
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    TEXT = "the quick brown fox jumps over the lazy dog; " * 30
    data = Loader(tokenize([TEXT], Tokenizer.bytes(), folder / "tokens"), length=16)

    def settings(**changes):
        network = {"layers": 2, **changes.pop("network", {})}
        options = dict(
            algorithm=EsoLM(alpha_0=0.5),
            network=Config(vocab_size=258, length=16, width=32, heads=2, **network),
            optim=optim.Config(schedule=optim.Schedule(peak=3e-3, warmup=4), average=0.95, weight_decay=0.1),
            num_steps=8, batch_size=8, dtype="float32", log_every=1,
            validate_every=5, validation_texts=8, save_every=4, keep=9,
        )
        return training.Run(**{**options, **changes})

    def train(run, name, together, **options):
        return training.train(
            run, folder / name, tokenizer=Tokenizer.bytes(), data=data, validation=data, ranks=together,
            console=Console(quiet=True), **options,
        )

    SCRIPT

    def fork(rank, size, port, name, options):
        child = os.fork()
        if child:
            return child
        log = os.open(folder / f"{name}-{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(log, 2)
        if size > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        code = 1
        try:
            code = live(name, **options) or 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    for line in sys.stdin:
        name, size, grace, options = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        began = time.monotonic()
        children = {fork(rank, size, port, name, options): rank for rank in range(size)}
        codes, ended = [None] * size, [0.0] * size
        while children:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child:
                rank = children.pop(child)
                codes[rank], ended[rank] = os.waitstatus_to_exitcode(status), time.monotonic() - began
                first = min(filter(None, ended))
            elif any(ended) and time.monotonic() - began > first + grace:
                for child in children:  # as torchrun does with what goes on when one has ended
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        print(json.dumps([codes, ended]), flush=True)
"""


class Worlds:
    """A nursery of worlds over a folder; a context manager."""

    def __init__(self, folder: Path, script: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        lines = script.strip("\n").splitlines()
        program = _NURSERY.replace("    SCRIPT\n", "".join(f"    {line}\n" for line in lines))
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Worlds":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def codes(self, name: str, size: int, **options: Any) -> list[int]:
        """The exit code of each rank of a world; -9 for one that was killed."""
        return self.ended(name, size, **options)[0]

    def ended(self, name: str, size: int, *, grace: float = 120.0, **options: Any) -> tuple[list[int], list[float]]:
        """The exit code of each rank, and after how many seconds it ended. `grace` seconds after the first has ended
        those that still go on are killed."""
        self._process.stdin.write(json.dumps([name, size, grace, options]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the nursery died"
        codes, seconds = json.loads(answer)
        return codes, seconds

    def told(self, name: str, rank: int) -> str:
        """What a rank wrote to stderr."""
        return (self.folder / f"{name}-{rank}.err").read_text()
