"""The notebook: executed as it lies in the repository, and every cell of it runs anew, as `make notebook` runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from esolm import corpus
from test_documents import _exists
from test_structure import SOURCE

ROOT = SOURCE.parent.parent
PATH = ROOT / "docs/tutorials/welcome.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
SHORTER = (  # what takes minutes, and for a test
    ("NUM_STEPS = 400", "NUM_STEPS = 3"),
    ("TEXTS = 6", "TEXTS = 1"),
    ("validation_texts=64", "validation_texts=4"),
    ('data=\\"shakespeare\\"', 'data=\\"PLACE\\"'),
)
LARGEST = 400_000  # bytes
Cell = dict[str, Any]


def code(notebook: Cell) -> list[Cell]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: Cell) -> str:
    return "".join(cell["source"])


def shown(cell: Cell) -> list[str]:
    """What a cell shows: the kinds of its outputs."""
    return [kind for output in cell["outputs"] for kind in output.get("data", {"text": ""})]


def told(cell: Cell) -> str:
    """What a cell says, in words: all but pictures."""
    parts = []
    for output in cell["outputs"]:
        data = {"": output.get("text", ""), **output.get("data", {})}
        parts += ["".join(text) for kind, text in data.items() if not kind.startswith("image/")]
    return "\n".join(parts)


def run_make_notebook(path: Path) -> subprocess.CompletedProcess[str]:
    """What `make notebook` does, to another file."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(r"^notebook:.*\n\t\$\(BIN\)/python (.*)", makefile, re.MULTILINE)
    words = line.split()
    assert (ROOT / words[-1]) == PATH
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words[:-1], str(path)], cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )


# -- as it lies here ---------------------------------------------------------------------------------------


def test_the_cells_were_executed_in_order_and_none_failed():
    cells = code(NOTEBOOK)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize(
    ("written", "kind"), [("plt.show()", "image/png"), ("print(", "text"), ("\nshown(", "text/html")]
)
def test_a_cell_that_shows_something_has_it(written, kind):
    cells = [cell for cell in code(NOTEBOOK) if written in "\n" + source(cell)]
    assert cells and all(kind in shown(cell) for cell in cells)


def test_outputs_tell_nothing_of_the_machine_and_hold_no_remains_of_a_terminal():
    for cell in code(NOTEBOOK):
        words = re.sub(r"</?[a-z][^>]*>", "", told(cell))
        assert not re.search(r"(?<![\w.])/\w+/|[A-Z]:\\|~/", words), words
        assert not re.search("[Ww]arning|Traceback|[\x1b\r\b]", words), words
        assert "execution" not in cell["metadata"]
    assert NOTEBOOK["metadata"]["language_info"] == {"name": "python"}


def test_it_is_small():
    assert PATH.stat().st_size <= LARGEST


def test_what_it_says_is_there():
    words = "\n\n".join(source(cell) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)", words) if "://" not in link]
    assert len(links) > 5 and not [link for link in links if not (PATH.parent / link).exists()]
    assert not [name for name in re.findall(r"`([^`\n]+)`", words) if not _exists(name)]


# -- executed anew -----------------------------------------------------------------------------------------


@pytest.fixture
def nbclient():
    return pytest.importorskip("nbclient", reason="NOTEBOOK NOT EXECUTED: the extra `docs` is not installed")


@pytest.mark.timeout(900)
def test_every_cell_runs_and_shows_what_the_committed_one_shows(nbclient, tmp_path):
    first = next(iter(corpus.documents(corpus.shipped("shakespeare"), field="text")))
    parts = (first[at : at + 5000] for at in range(0, 100_000, 5000))
    (tmp_path / "plays.txt").write_text("\f".join(parts), encoding="utf-8")
    text = PATH.read_text(encoding="utf-8")
    for long, short in SHORTER:
        assert text.count(long) == 1
        text = text.replace(long, short)
    bare = json.loads(text.replace("PLACE", str(tmp_path / "plays.txt")))
    for cell in code(bare):
        cell["outputs"], cell["execution_count"] = [], None
    path = tmp_path / "welcome.ipynb"
    path.write_text(json.dumps(bare))
    done = run_make_notebook(path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    again = json.loads(path.read_text(encoding="utf-8"))
    for cell, committed in zip(code(again), code(NOTEBOOK), strict=True):
        assert shown(cell) == shown(committed), source(cell)
        assert cell["execution_count"] == committed["execution_count"]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("x = 1\n1 / 0", "cell 1 (x = 1): ZeroDivisionError: division by zero"),
        ("import warnings\nwarnings.warn('old')", "cell 1 says on stderr: "),
    ],
)
def test_a_cell_that_fails_or_warns_is_named_and_the_file_stays(nbclient, tmp_path, program, words):
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# Title"},
        {"cell_type": "code", "id": "b", "metadata": {}, "source": program, "outputs": [], "execution_count": None},
    ]
    path = tmp_path / "small.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    before = path.read_bytes()
    done = run_make_notebook(path)
    assert done.returncode == 1 and done.stderr.startswith(f"small.ipynb: {words}"), done.stderr
    assert path.read_bytes() == before
