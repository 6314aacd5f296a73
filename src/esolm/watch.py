"""A text being written, in the terminal: what diffusion wrote in one colour, what came left to right in another.

    with Watch(length, decode=tokenizer.decode, given=request.given) as watch:
        for reveal in model.write([request]):
            watch.reveal(reveal)

Where the output is no terminal nothing moves: the text is printed once, when it is done. It writes no text itself.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from types import TracebackType
from typing import Literal

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from esolm.sample import Reveal

Kind = Literal["given", "diffusion", "sequential", "unwritten"]
STYLES: dict[Kind, str] = {"given": "bold", "diffusion": "cyan", "sequential": "yellow", "unwritten": "dim"}
_LEGEND: tuple[tuple[Kind, str], ...] = (
    ("given", "given"),
    ("diffusion", "diffusion, any order"),
    ("sequential", "left to right"),
)
_BLOCK = "░░ "  # about as wide as a token
_FRAME = 1 / 15  # seconds between two pictures, at least


class Watch:
    """One text being written. A context manager; the coloured text stays when it ends."""

    def __init__(
        self,
        length: int,
        *,
        decode: Callable[[Sequence[int]], str],
        given: Mapping[int, int] | None = None,
        end_id: int | None = None,
        console: Console | None = None,
        live: bool = True,
        slower: float = 0.0,
    ) -> None:
        """`slower`: seconds to rest after each step, for the eye."""
        self.console = console or Console()
        self._decode, self._end_id, self._slower = decode, end_id, slower
        self._tokens: list[int | None] = [None] * length
        self._kinds: list[Kind] = ["unwritten"] * length
        for position, token in (given or {}).items():
            self._tokens[position], self._kinds[position] = token, "given"
        self._first_free = next((p for p in range(length) if p not in (given or {})), length)
        self._latest, self._steps, self._phase, self._written = 0, 0, "", 0
        self._began = time.monotonic()
        self._drawn = 0.0
        self._live = Live(console=self.console, auto_refresh=False, transient=True) if live and self._moves() else None

    def __enter__(self) -> "Watch":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if error is not None and not isinstance(error, KeyboardInterrupt):
            return
        if self._moves():
            self.console.print(self._header(), self.text(), sep="\n")
        else:  # as it is, whatever characters it has
            self.console.file.write("".join(part for _, part in self._parts()) + "\n")

    def reveal(self, reveal: Reveal) -> None:
        """Take what a step wrote, and draw if it is time."""
        for position, token in zip(reveal.positions, reveal.tokens, strict=True):
            self._tokens[position], self._kinds[position] = token, reveal.phase
        self._latest = max(reveal.positions)
        self._steps, self._phase = self._steps + 1, reveal.phase
        self._written += len(reveal.positions)
        if self._live is None:
            return
        now = time.monotonic()
        if now - self._drawn >= _FRAME or self._slower:
            self._live.update(self._picture(), refresh=True)
            self._drawn = now
        time.sleep(self._slower)

    def text(self) -> Text:
        """The text as it stands, coloured, up to its first end-of-text."""
        return Text.assemble(*((part, STYLES[kind]) for kind, part in self._parts()))

    def _parts(self) -> Iterator[tuple[Kind, str]]:
        """Runs of one kind, in reading order."""
        for kind, positions in groupby(range(self._end()), key=lambda position: self._kinds[position]):
            tokens = [self._tokens[position] for position in positions]
            known = [token for token in tokens if token is not None]
            yield kind, self._decode(known) if known else _BLOCK * len(tokens)

    def _end(self) -> int:
        """Where the text stops: its first end-of-text that is not given, or its length."""
        for position in range(self._first_free, len(self._tokens)):
            if self._tokens[position] is not None and self._tokens[position] == self._end_id:
                return position
        return len(self._tokens)

    def _moves(self) -> bool:
        return self.console.is_terminal

    def _header(self) -> Text:
        speed = self._written / max(time.monotonic() - self._began, 1e-6)
        words = f"{self._written} tokens in {self._steps} steps"
        header = Text(words if self._slower else f"{words} · {speed:,.0f} tokens/s", style="dim")
        for kind, label in _LEGEND:
            if kind in self._kinds:
                header.append("   ■ ", STYLES[kind]).append(label)
        return header

    def _picture(self) -> Group:
        """Header and text, cropped to the screen around what was written last."""
        room = max(3, self.console.height - 3)
        lines = self.text().wrap(self.console, self.console.width)
        first = 0
        if len(lines) > room:
            share = self._latest / max(1, len(self._tokens))
            first = min(max(0, round(share * len(lines)) - room // 2), len(lines) - room)
        phase = Text(f"{self._phase} phase", style=f"bold {STYLES.get(self._phase, '')}")  # type: ignore[call-overload]
        return Group(Text.assemble(phase, "  ", self._header()), *lines[first : first + room])
