"""Saving while training goes on: the state is copied, and a thread writes the copy.

    saving.begin(state)     waits for the write before, copies, starts the next      <- all that training waits for
    saving.look()           tells of a write that has ended: `saved`, or a warning   <- after every step
    saving.finish(state)    waits, and writes the last state here; SaveError if that fails

One write is in flight at most. A step is told only once it is on disk under its name; a write that failed is told and
tried again soon. The copies stay between saves, since new memory costs more than copying into it: 16 bytes a parameter
in the machine's memory. Where there is no room for them training waits for the write, as it would without this module.
Hashing, writing and syncing let go of the interpreter, so a thread is enough. Several ranks write while training waits:
threads that end at different moments would have to agree on what is saved and what is due. How a checkpoint is
written: checkpoint.py.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from esolm import checkpoint, memory
from esolm.checkpoint import Checkpoint, SaveError
from esolm.ranks import ALONE, Ranks

_TRIES = 10  # a save that failed is tried again ten times before the next one is due, at most


class Saving:
    """The checkpoints of one run; a context manager, whose end waits for the write under way.

    `every`: steps between two. `keep`: how many stay (checkpoint.save). `tell(name, text)` takes `saved` with a step's
    folder, and `warning` with what went wrong.
    """

    def __init__(
        self, folder: Path, every: int, keep: int, tell: Callable[[str, str], object], ranks: Ranks = ALONE
    ) -> None:
        self.folder, self.every, self.keep, self.tell = folder, every, keep, tell
        self._thread: threading.Thread | None = None
        self._ends: list[tuple[str, str] | BaseException] = []  # what the thread has to tell, in order
        self._copies: dict[tuple[str, str], Tensor] = {}
        self.ranks = ranks
        self._copying = ranks.alone  # until memory runs out
        self._unsaved = False  # the last save that was due is not on disk

    def due(self, step: int) -> bool:
        """Whether to save at this step: one is due, or the last one failed and it is time to try again."""
        return step % self.every == 0 or (self._unsaved and step % max(1, self.every // _TRIES) == 0)

    def begin(self, state: Checkpoint) -> None:
        """Save a state, whose tensors may change as soon as this returns."""
        self._wait()
        copy = self._copied(state) if self._copying else None
        if copy is None or not self._started(copy):
            self._write(state)
        self.look()

    def refuse(self, why: object) -> None:
        """A state that must not be saved."""
        self._unsaved = True
        self.tell("warning", f"not saved: {why}; the checkpoints from before are kept")

    def look(self) -> None:
        """Tell of what has ended since the last look. What is no failure of the disk is raised here."""
        while self._ends:
            end = self._ends.pop(0)
            if isinstance(end, tuple):
                self._unsaved &= end[0] != "saved"
                self.tell(*end)
            elif isinstance(end, SaveError):
                self._unsaved = True
                self.tell("warning", f"{end}; training goes on and tries again")
            else:
                raise end

    def finish(self, state: Checkpoint) -> None:
        """Wait for the write under way, then write the last state. Raises SaveError."""
        self._wait()
        self.look()
        self._write(state)
        if isinstance(end := self._ends[-1], SaveError):
            self._ends.pop()
            raise end
        self.look()

    def forget(self) -> bool:
        """Free the memory of the copies once they are written, and make no more; whether there were any."""
        self._wait()
        had, self._copies, self._copying = bool(self._copies), {}, False
        return had

    def __enter__(self) -> "Saving":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            return  # a second Ctrl-C wants to leave at once: what is half written is cleared away by the next save
        self._wait()
        if error is not None:  # which matters more than how the write ended, unless it ended well or the disk is full
            self._ends = [end for end in self._ends if isinstance(end, tuple | SaveError)]
        self.look()

    def _started(self, copy: Checkpoint) -> bool:
        """Start the thread that writes a copy; False where there is no room for one more thread."""
        thread = threading.Thread(target=self._write, args=(copy,), daemon=True, name="esolm saving")
        try:
            thread.start()
        except RuntimeError:
            return False
        self._thread = thread
        return True

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, state: Checkpoint) -> None:
        """Write a state and note how it ended; it raises nothing, since nobody is there to see it."""
        try:
            path = checkpoint.save(
                self.folder,
                state,
                keep=self.keep,
                warn=lambda words: self._ends.append(("warning", words)),
                ranks=self.ranks,
            )
        except BaseException as problem:
            self._ends.append(problem)
        else:
            self._ends.append(("saved", path.name))

    @torch.no_grad()
    def _copied(self, state: Checkpoint) -> Checkpoint | None:
        """The state with tensors of its own in the machine's memory; None where there is no room for them."""
        groups = {"model": state.model, "ema": state.ema or {}, "optim": state.optim}
        tensors = {(group, name): tensor for group, found in groups.items() for name, tensor in found.items()}
        try:
            if not self._copies:
                self._copies = _room_for(tensors)
            for key, tensor in tensors.items():
                self._copies[key].copy_(tensor)
        except (MemoryError, RuntimeError) as problem:
            if not memory.ran_out(problem):
                raise
            self._copies, self._copying = {}, False
            return None
        own = {group: {name: self._copies[group, name] for name in found} for group, found in groups.items()}
        return replace(state, model=own["model"], ema=None if state.ema is None else own["ema"], optim=own["optim"])


def _room_for(tensors: dict[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
    """Tensors of the same shapes in the machine's memory. MemoryError where they would take most of what is left."""
    left = memory.available(torch.device("cpu"))
    if left is not None and 2 * sum(tensor.nbytes for tensor in tensors.values()) > left:
        raise MemoryError
    return {
        key: torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
