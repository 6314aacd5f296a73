"""The site: built without a warning, with docstrings as they were written and nothing fetched from elsewhere."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from esolm import cli
from esolm.algorithms import esolm as method
from test_structure import SOURCE

pytest.importorskip("sphinx", reason="SITE TESTS SKIPPED: the extra `docs` is not installed")

ROOT = SOURCE.parent.parent
sys.path.append(str(ROOT / "docs"))

from from_code import as_written, help_of  # noqa: E402 - it stands beside the pages


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make docs` builds it."""
    place = tmp_path_factory.mktemp("site")
    (line,) = re.findall(r"-m (sphinx .*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    words = line.replace("build/doctrees", str(place / "trees")).replace("build/docs", str(place / "site")).split()
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    built = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    assert built.returncode == 0 and not built.stderr, built.stderr
    return place / "site"


def test_what_is_fetched_is_part_of_the_site(site):
    fetched = 0
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|source|iframe)\b[^>]*>", page.read_text(encoding="utf-8"))
        for address in re.findall(r'(?:src|href)="([^"]*)"', " ".join(tags)):
            path = address.partition("?")[0].partition("#")[0]
            assert not path or (page.parent / path).exists(), (page.name, address)
            fetched += 1
    for sheet in site.rglob("*.css"):
        found = re.findall(r"url\(['\"]?([^)'\"]*)|@import ([^;]*)", sheet.read_text(encoding="utf-8"))
        assert not [address for address in found if re.match("(https?:)?//", "".join(address))], sheet.name
    assert fetched > 100


def test_a_drawing_of_a_docstring_is_drawn_line_by_line(site):
    """The masks of the two Eso-LMs, which mean nothing once their lines are filled."""
    lines = [line.strip() for line in (method.__doc__ or "").splitlines() if line.startswith("        ")]
    page = (site / "reference/methods.html").read_text(encoding="utf-8")
    drawings = html.unescape(re.sub("<[^>]*>", "", "\n".join(re.findall(r"<pre>.*?</pre>", page, re.DOTALL))))
    assert len(lines) >= 5 and all(line in drawings for line in lines)


def test_the_pages_show_the_help_and_the_pictures(site):
    page = html.unescape((site / "reference/commands.html").read_text(encoding="utf-8"))
    assert all(help_of(name) in page for name in cli._COMMANDS)
    pictures = (site / "explanation/method.html").read_text(encoding="utf-8")
    assert pictures.count('<svg xmlns="http://www.w3.org/2000/svg" width="130"') >= 2  # eight rows: AR and MDLM


def test_the_notebook_is_a_page_with_what_its_cells_gave(site):
    page = (site / "tutorials/welcome.html").read_text(encoding="utf-8")
    notebook = json.loads((ROOT / "docs/tutorials/welcome.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", ())]
    assert len(pictures) >= 5 and len(re.findall(r'<img [^>]*src="\.\./_images/', page)) == len(pictures)
    words = html.unescape(re.sub("<[^>]*>", "", page))
    told = ["".join(output["text"]).strip() for output in outputs if output["output_type"] == "stream"]
    assert len(told) >= 5 and all(text in words for text in told)
    index = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="tutorials/welcome.html"' in index


def test_prose_of_a_docstring_keeps_its_marks():
    assert list(as_written(["(B) reads x_l * 2."])) == ["", "\\(B) reads x\\_l \\* 2.", ""]
    assert list(as_written(["Yields `Reveal`s, over", "two `long", "names` too."])) == [
        *("", "Yields ``Reveal``\\ s, over", "two ``long", "names`` too.", "")
    ]
    assert "So:\n\n\n\n::\n\n    x_l\n\n" in "\n".join(as_written(["So:", "", "    x_l", "", "It."]))
