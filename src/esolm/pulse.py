"""A sign of life among processes that train together, each for itself. It sums and decides nothing (ranks.py)."""

import itertools
import os
import threading
import time
from typing import Any


class Pulse(threading.Thread):
    """Tells the other ranks every second that this process runs, and ends it when one of them no longer tells.

    A message that a rank waits for shows it that another died, and inside a step that another hangs. This shows it also
    while it waits patiently; nothing else can end a wait from inside. `store`: a connection of its own, for the
    process's is held while it waits."""

    def __init__(self, store: Any, world: str, rank: int, size: int, answer: float) -> None:
        super().__init__(daemon=True)
        self._store = store
        self._rank, self._keys, self._answer = rank, [f"{world}/pulse/{each}" for each in range(size)], answer
        self._over = threading.Event()
        self._store.set(self._keys[rank], "0")

    def run(self) -> None:
        heard = dict.fromkeys(self._keys, (b"", time.monotonic()))
        for beat in itertools.count():
            if self._over.wait(min(1.0, self._answer / 4)):
                return
            try:
                self._store.set(self._keys[self._rank], str(beat))
                told = dict(zip(self._keys, self._store.multi_get(self._keys), strict=True))
            except RuntimeError:  # also at the end, when the store has gone before this thread
                if self._over.wait(2.0):
                    return
                self._end("torchrun or rank 0")
            now = time.monotonic()
            heard = {key: (word, now) if heard[key][0] != word else heard[key] for key, word in told.items()}
            for rank, (_, since) in enumerate(heard.values()):
                if now - since > self._answer:
                    self._end(f"rank {rank}")

    def stop(self) -> None:
        self._over.set()

    def _end(self, who: str) -> None:
        os.write(2, f"esolm: rank {self._rank} stops: {who} does not answer\n".encode())
        os._exit(1)
