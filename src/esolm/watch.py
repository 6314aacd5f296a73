"""A text being written, in the terminal: what diffusion wrote in one colour, what came left to right in another.

    with Watch(length, decode=tokenizer.decode, given=request.given) as watch:
        for reveal in model.write([request]):
            watch.reveal(reveal)

Where the output is no terminal nothing moves: the text is printed once, when it is done. It writes no text itself.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    ("diffusion", "diffusion"),
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
            self.console.print(self._header(now=""), self.text(), sep="\n")
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
        return _coloured(self._parts())

    def _parts(self) -> Iterator[tuple[Kind, str]]:
        """Strings of tokens in reading order, each with its kind."""
        places = range(self._end())
        for written, positions in groupby(places, key=lambda position: self._tokens[position] is not None):
            run = list(positions)
            tokens = [token for token in self._tokens[run[0] : run[-1] + 1] if token is not None]
            strings = pieces(self._decode, tokens) if written else [_BLOCK] * len(run)
            yield from zip((self._kinds[position] for position in run), strings, strict=True)

    def _rough_parts(self) -> Iterator[tuple[Kind, str]]:
        """The same, decoded run by run: fast enough for every frame, and wrong only in characters that two phases
        wrote."""
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

    def _header(self, now: str) -> Text:
        """What was done, and the colours; that of the phase going on now stands out."""
        speed = self._written / max(time.monotonic() - self._began, 1e-6)
        words = f"{self._written} tokens in {self._steps} steps"
        header = Text().append(words if self._slower else f"{words} · {speed:,.0f} tokens/s", "dim")
        for kind, label in _LEGEND:
            if kind in self._kinds:
                style = STYLES[kind]
                header.append("  ■ ", style).append(label, f"bold {style}" if kind == now else "dim")
        return header

    def _picture(self) -> Group:
        """Header and text, cropped to the screen around what was written last."""
        room = max(3, self.console.height - 3)
        lines = _coloured(self._rough_parts()).wrap(self.console, self.console.width)
        first = 0
        if len(lines) > room:
            share = self._latest / max(1, len(self._tokens))
            first = min(max(0, round(share * len(lines)) - room // 2), len(lines) - room)
        return Group(self._header(now=self._phase), *lines[first : first + room])


def pieces(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """The string of each token; joined they are the text. Of tokens that share a character, the last has it.

    A token is decoded after the one before it, since some tokenizers drop the space of a first token.
    """
    strings: list[str] = []
    before: list[int] = []
    pending: list[int] = []  # tokens that may yet become one character
    base, text = "", ""
    for token in ids:
        pending.append(token)
        longer = decode([*before, *pending])[len(base) :]
        if not longer.startswith(text):
            strings[len(strings) - len(pending) + 1 :] = [""] * (len(pending) - 1)
            text = ""
        strings.append(longer[len(text) :])
        text = longer
        if not longer.endswith("\ufffd"):
            before, pending, text = [token], [], ""
            base = decode(before)
    return strings


def _coloured(parts: Iterable[tuple[Kind, str]]) -> Text:
    runs = groupby(parts, key=lambda part: part[0])
    return Text.assemble(*(("".join(string for _, string in run), STYLES[kind]) for kind, run in runs))
