"""The page as a file, and its stills: everything is in it, nothing is fetched, nothing is half written."""

import json
import re
from dataclasses import asdict
from xml.etree import ElementTree

import pytest

from esolm import report
from pages import END, PIECES, REVEALS, whole_report

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    report.write(whole_report(), path)
    return path.read_text(encoding="utf-8")


def test_the_page_holds_the_report_as_it_is(page):
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data) == json.loads(json.dumps(asdict(whole_report())))


def test_no_text_can_close_the_script_that_it_stands_in(page):
    assert page.count("</script>") == page.count("<script") == 2


def test_the_page_names_no_address(page):
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"\b(?:src|url|import|fetch)\s*[=(]", page)


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OSError):
        report.write(whole_report(), tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_figures_that_are_not_finite_are_refused(tmp_path):
    curve = report.Curve(name="training", points=((1.0, float("nan")),))
    with pytest.raises(ValueError):
        report.write(report.Report(title="", curves=(curve,)), tmp_path / "report.html")


def test_a_picture_has_a_label_and_a_flag_for_each_row():
    with pytest.raises(ValueError, match="square"):
        report.Picture(name="", caption="", rows=("#.", "##"), labels=("a", "b"), masks=(True,))
    with pytest.raises(ValueError, match="square"):
        report.Picture(name="", caption="", rows=("#.", "#"), labels=("a", "b"), masks=(True, False))


def test_a_drawn_picture_fills_what_is_read_in_the_colour_of_the_row_that_reads():
    picture = report.Picture(name="X & Y", caption="<all>", rows=("#.", "##"), labels=("a", "b"), masks=(False, True))
    drawn = ElementTree.fromstring(report.drawn(picture))
    cells = {(float(cell.get("y")), float(cell.get("x"))): cell.get("class") for cell in drawn.iter(f"{SVG}rect")}
    assert [cells[place] for place in sorted(cells)] == ["token", "blank", "mask", "mask"]
    letters = [(letter.text, letter.get("class")) for letter in drawn.iter(f"{SVG}text")]
    assert letters == [("a", "token")] * 2 + [("b", "mask")] * 2
    assert drawn.get("aria-label") == "X & Y. <all>"


def stills(*steps: int, **options: int) -> ElementTree.Element:
    replay = report.replay_of("A text", "", PIECES, REVEALS, END)
    return ElementTree.fromstring(report.stills(replay, steps, **options))


def lines_of(panel: ElementTree.Element) -> list[str]:
    """The written text of a panel, line by line, without its heading and what is left blank."""
    rows: dict[float, dict[float, str]] = {}
    for mark in panel.iter(f"{SVG}text"):
        if "head" not in mark.attrib["class"]:
            rows.setdefault(float(mark.attrib["y"]), {})[float(mark.attrib["x"])] = mark.text
    return [" ".join(text for _, text in sorted(row.items())) for _, row in sorted(rows.items())]


def test_stills_show_what_is_written_at_their_steps():
    given, diffused, done = stills(0, 2, 9).iter(f"{SVG}g")
    assert lines_of(given) == ["KING."]
    assert lines_of(diffused) == ["KING.", "be or"]
    assert lines_of(done) == ["KING.", "To be , or not <b>", "now"]
    assert len(list(given.iter(f"{SVG}rect"))) == 7  # a box for each token to come that has letters
    assert not list(done.iter(f"{SVG}rect"))


def test_stills_keep_every_word_in_its_place():
    places = [
        {mark.text: (mark.attrib["x"], mark.attrib["y"]) for mark in panel.iter(f"{SVG}text")}["or"]
        for panel in stills(1, 4, 6, width=20).iter(f"{SVG}g")
    ]
    assert len(set(places)) == 1


@pytest.mark.parametrize("width", [6, 9, 80])
def test_stills_break_lines_at_their_width(width):
    (panel,) = stills(9, width=width).iter(f"{SVG}g")
    lines = lines_of(panel)
    assert "".join("".join(lines).split()) == "".join("".join(PIECES[:END]).split())
    ends = [float(mark.attrib["x"]) + float(mark.attrib["textLength"]) for mark in panel.findall(f"{SVG}text")[1:]]
    assert 0 < max(ends) <= width * 8.4 + 1e-6
