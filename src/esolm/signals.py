"""Being asked to stop: SIGINT, SIGTERM and SIGUSR1, while something can be saved and while nothing can.

    listening()   in training: the first signal asks for a stop, so that the step ends and the run is saved (exit 75)
    leaving()     around a command: what cannot be saved ends at once (130 after SIGINT, 143 after the others)

A second SIGINT always ends the process at once: in training as KeyboardInterrupt, and around a command even in the
midst of a long matrix product, when Python runs no handlers. Only the main thread listens.

Python drops what is raised inside a destructor or a weak reference's callback, and a handler may run there. Around a
command such a signal is sent once more, so that none is lost.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
SIGNALS = tuple(signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__)
INTERRUPTED, TERMINATED = 130, 143  # exit codes, as shells count them


class Terminated(BaseException):
    """A command that has nothing to save was asked to stop. Like KeyboardInterrupt, no `except Exception` holds it."""


class _Again:
    """How many SIGINTs we sent ourselves, because Python had dropped the first."""

    interrupts = 0


class Stop:
    """True once somebody has asked this process to stop; `name` says how."""

    def __init__(self) -> None:
        self.name = ""

    def __bool__(self) -> bool:
        return bool(self.name)


@contextmanager
def listening() -> Iterator[Stop]:
    """A `Stop` that the first signal makes true; a second SIGINT raises KeyboardInterrupt."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.name = stop.name or signal.Signals(number).name

    with _handled(dict.fromkeys(SIGNALS, note)):
        yield stop


@contextmanager
def leaving() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 raise `Terminated`, and a second SIGINT ends the process where it stands."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Terminated

    again = _Again()
    handlers: dict[signal.Signals, object] = {number: leave for number in SIGNALS if number != signal.SIGINT}
    with _handled(handlers), _second_interrupt_ends(again), _none_lost(again):
        yield


@contextmanager
def _none_lost(again: _Again) -> Iterator[None]:
    """A signal whose exception was raised where Python drops exceptions is sent once more, and nothing is printed."""
    before = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            again.interrupts += 1
            _send_soon(signal.SIGINT)
        elif isinstance(dropped.exc_value, Terminated):
            _send_soon(signal.SIGTERM)
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _send_soon(number: signal.Signals) -> None:
    """From another thread: sent at once, its handler would run inside the hook, where Python drops exceptions too."""
    sending = threading.Timer(0.05, os.kill, (os.getpid(), number))
    sending.daemon = True
    sending.start()


@contextmanager
def _handled(handlers: "dict[signal.Signals, object]") -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _second_interrupt_ends(again: _Again) -> Iterator[None]:
    """A thread that counts interrupts as the system delivers them, whatever the main thread is doing; not our own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def count() -> None:
        interrupts = 0
        while number := os.read(reading, 1):
            interrupts += number[0] == signal.SIGINT
            if interrupts - again.interrupts == 2:
                os.write(2, b"esolm: interrupted\n")
                os._exit(INTERRUPTED)

    counting = threading.Thread(target=count, daemon=True)
    counting.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)  # ends the thread
        counting.join()
        os.close(reading)
