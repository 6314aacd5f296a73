"""What pages take from the code while they are built: docstrings as they were written, help, pictures of the rule.

docstring         prose stays prose, what is indented (drawings, equations, examples) stays as it is drawn
{commands}        the help of every command of `esolm`, from its parser
{who-reads} NAME  who reads whom in a method, as `report.drawn` draws it
"""

import contextlib
import html
import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from esolm import cli, exhibits, report
from esolm.cli import parsing


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-process-signature", _signature)
    app.connect("source-read", _source)
    app.add_directive("commands", Commands)
    app.add_directive("who-reads", WhoReads)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


class Commands(SphinxDirective):
    """A section for each command, with what `esolm COMMAND --help` prints."""

    def run(self) -> list[nodes.Node]:
        return [self._section(name) for name in cli._COMMANDS]

    def _section(self, name: str) -> nodes.section:
        section = nodes.section("", nodes.title("", f"esolm {name}"), names=[f"esolm {name}"])
        self.state.document.note_implicit_target(section)
        section += nodes.literal_block("", help_of(name), language="none")
        return section


def help_of(name: str) -> str:
    """What a command prints when it is asked for its help, 80 characters wide."""
    told = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # one that can hold frames
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"
    try:
        with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
            parsing.call_of(cli._COMMANDS[name], name, ["--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    told.seek(0)
    return re.sub("\x1b\\[[0-9;]*m", "", told.read()).strip()


class WhoReads(SphinxDirective):
    """The pictures of the methods whose names begin with the argument; of all, if there is none."""

    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        begin = self.arguments[0] if self.arguments else ""
        figures = "".join(_figure(picture) for picture in exhibits.pictures() if picture.name.startswith(begin))
        if not figures:
            raise self.error(f"there is no picture of {begin!r}")
        return [nodes.raw("", f'<div class="who-reads">{figures}</div>', format="html")]


def _figure(picture: report.Picture) -> str:
    told = f"<b>{html.escape(picture.name)}</b> {html.escape(picture.caption)}"
    return f"<figure>{report.drawn(picture)}<figcaption>{told}</figcaption></figure>"


def _source(app: Sphinx, page: str, text: list[str]) -> None:
    """Pages lead to CONTRIBUTING.md and README.md in the folder above, which have pages of their own here."""
    text[0] = text[0].replace("](../CONTRIBUTING.md", "](contributing.md").replace("](../README.md", "](index.md")


def _signature(app: Sphinx, what: str, name: str, obj: object, options: Any, *told: str | None) -> tuple[Any, ...]:
    """A field that is made anew for each value has no default to show."""
    return tuple(part and part.replace("<factory>", "...") for part in told)


def _docstring(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    lines[:] = list(as_written(lines))


def as_written(lines: Sequence[str]) -> Iterator[str]:
    """A docstring as reStructuredText that shows it as it was written: what is indented as a literal block."""
    for kind, run in itertools.groupby(lines, key=_kind):
        if kind == "drawn":
            yield from ("", "::", "", *run, "")
        elif kind == "prose":
            yield from ("", *_prose("\n".join(run)).split("\n"), "")
        else:
            yield ""


def _kind(line: str) -> str:
    return "blank" if not line.strip() else "drawn" if line[0] == " " else "prose"


def _prose(text: str) -> str:
    """A paragraph: names in backticks are code, papers are links, all other marks are themselves."""
    parts = re.split(r"(`+[^`]+`+)", text)
    for at, part in enumerate(parts):
        if at % 2:
            parts[at] = f"``{part.strip('`')}``"
        else:  # "`Reveal`s": what follows code must begin with a mark, if only an escape
            escaped = re.sub(r"([\\*|_`])", r"\\\1", part)
            parts[at] = ("\\ " if at and re.match(r"\w", part) else "") + _linked(escaped)
    told = "".join(parts)
    listed = re.match(r"\(?\w{1,4}[.)] |[-+•] |\.\. ", told)  # "(B) attends": no list begins here
    return "\\" + told if listed else told


def _linked(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", text)
