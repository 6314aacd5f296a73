"""Runs are listed and drawn from their logs, whatever happened to them."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from esolm import cli, curves, history
from esolm.journal import FILE, Journal
from esolm.sinks import plus_minus
from pictures import drawn, words_on_words


def write(folder: Path, steps: range, *, end: str | None = "finished", resume: int | None = None, offset=0.0) -> None:
    console = Console(file=io.StringIO())
    with Journal(folder, total=10, resume=resume, facts={"method": "AR()"}, console=console) as journal:
        journal.begin()
        for step in steps:
            journal.write(step, loss=10.0 - step + offset, tokens_per_second=1000.0, seconds=2.0 * step, rate=1e-3)
            if step % 5 == 0:
                journal.write(step, validation=11.0 - step, validation_error=0.25)
        if end is not None:
            journal.end(end)


def test_the_state_of_a_run_is_how_its_log_ends(tmp_path):
    for name, end in (("a", "finished"), ("b", "interrupted"), ("c", None), ("d", "died: a weight is NaN")):
        write(tmp_path / name, range(1, 8), end=end)
    found = {path.name: history.of(path) for path in history.find([tmp_path])}
    assert [found[name].state for name in "abcd"] == ["finished", "interrupted", "died", "died"]
    assert found["d"].why == "a weight is NaN"
    assert found["a"].step == 7 and found["a"].total == 10 and found["a"].last("validation") == 6.0


def test_a_run_that_goes_on_is_running_and_once_killed_it_died(tmp_path):
    code = """if True:
        import sys, time
        from pathlib import Path
        from esolm.journal import Journal
        journal = Journal(Path(sys.argv[1]), total=10)
        journal.begin()
        journal.write(1, loss=1.0)
        print("going", flush=True)
        time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"going\n"
        assert history.of(tmp_path / "run").state == "running"
        process.kill()
    assert history.of(tmp_path / "run").state == "died"


def test_steps_that_were_done_again_count_once(tmp_path):
    write(tmp_path, range(1, 9), end=None)
    lines = (tmp_path / FILE).read_text().splitlines(keepends=True)
    write(tmp_path, range(6, 9), resume=5, offset=0.5)  # cuts the log
    again = (tmp_path / FILE).read_text().splitlines(keepends=True)
    assert len([line for line in again if '"loss"' in line]) == 8
    (tmp_path / FILE).write_text("".join(lines) + "".join(again[again.index(lines[6]) + 1 :]))  # a log that nobody cut
    loss = history.of(tmp_path).curves["loss"]
    assert loss.steps == list(range(1, 9))
    assert loss.values == [9.0, 8.0, 7.0, 6.0, 5.0, 4.5, 3.5, 2.5]


def test_a_torn_last_line_and_a_log_without_validation_are_read(tmp_path):
    write(tmp_path, range(1, 4), end=None)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes() + b'{"step": 4, "lo')
    found = history.of(tmp_path)
    assert found.step == 3 and found.last("validation") is None and found.state == "died"


def test_a_run_is_where_its_log_ends_also_before_its_first_figures(tmp_path):
    """A run that was stopped and saved at step 4, with a line of figures every ten steps, was listed at step 0."""
    with Journal(tmp_path, total=100, console=Console(quiet=True)) as log:
        log.begin()
        log.text(4, "saved", "step-000000004")
        log.end("interrupted")
    assert history.of(tmp_path).step == 4


def test_a_validation_on_one_text_has_no_error_and_none_is_shown():
    assert plus_minus(5.317, math.nan) == plus_minus(5.317, None) == "5.317"
    assert plus_minus(5.317, 0.25) == "5.317 ± 0.250"


def test_runs_are_listed_with_their_last_figures_and_a_damaged_log_hides_no_other(tmp_path, capsys):
    write(tmp_path / "sweep" / "one", range(1, 11))
    write(tmp_path / "two", range(1, 4), end="interrupted")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / FILE).write_text('{"step":\n{"step": 1}\n')
    cli.main(["runs", str(tmp_path), "--json"])
    told = capsys.readouterr()
    rows = [json.loads(line) for line in told.out.splitlines()]
    assert [(Path(row["run"]).name, row["state"], row["step"], row["loss"]) for row in rows] == [
        ("one", "finished", 10, 0.0),
        ("two", "interrupted", 3, 7.0),
    ]
    assert rows[0]["validation"] == 1.0 and rows[0]["validation_error"] == 0.25 and rows[1]["validation"] is None
    assert "line 1 of" in told.err and "broken" in told.err
    cli.main(["runs", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "10/10" in shown and "1.000 ± 0.250" in shown and "interrupted" in shown


@pytest.mark.parametrize(("width", "shown"), [(80, False), (140, True)])
def test_a_narrow_terminal_shows_names_rather_than_speeds(tmp_path, capsys, monkeypatch, width, shown):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(tmp_path)
    write(Path("sweep") / "a-name-of-20-letters", range(1, 11))
    cli.main(["runs", "sweep"])
    out = capsys.readouterr().out
    assert out.replace("\n", "").replace(" ", "").count("sweep/a-name-of-20-letters"[:24]) == 1
    assert "1.000 ± 0.250" in out and ("tokens/s" in out) == shown
    assert max(map(len, out.splitlines())) <= width


def test_a_very_narrow_terminal_shows_whole_words_of_what_fits(tmp_path, capsys, monkeypatch):
    """At 40 columns the name was gone, and the state was `finish`."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.chdir(tmp_path)
    write(Path("run"), range(1, 11))
    cli.main(["runs", "run"])
    out = capsys.readouterr().out
    assert "run " in out and "finished" in out and "10/10" in out and "0.000" in out


@pytest.mark.parametrize(("arguments", "code", "told"), [
    (["runs", "nowhere"], 3, "there is no folder nowhere"),
    (["plot", "nowhere"], 3, "nowhere holds no run"),
    (["plot"], 2, "RUN"),
])  # fmt: skip
def test_mistakes_are_told(arguments, code, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == code and told in capsys.readouterr().err


@pytest.mark.parametrize("top", [12.0, 90.0, 3e4, 1e12])
def test_no_word_of_a_logarithmic_panel_lies_on_another(tmp_path, monkeypatch, top):
    """Labels of the gradient norm's minor ticks did."""
    pytest.importorskip("matplotlib")
    figures = drawn(monkeypatch)
    console = Console(file=io.StringIO())
    with Journal(tmp_path, total=40, facts={}, console=console) as journal:
        for step in range(40):
            journal.write(step, norm=top ** (1 - step / 39), loss=2.0)
    curves.draw([history.of(tmp_path)], tmp_path / "curves.png")
    (panel,) = (axes for axes in figures[0].axes if "Gradient norm" in axes.get_title(loc="left"))
    assert panel.get_yscale() == "log" and 4 <= len(panel.get_yticks()) <= 9
    assert not words_on_words(figures[0])


def test_runs_are_drawn_and_what_cannot_be_drawn_is_told(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    write(tmp_path / "one", range(1, 11))
    write(tmp_path / "two", range(1, 4), end=None)
    picture = tmp_path / "curves.svg"
    cli.main(["plot", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(picture)])
    assert picture.stat().st_size > 10_000
    for out, told in (("curves.doc", "must end in"), ("no/curves.png", "no folder")):
        with pytest.raises(ValueError, match=told):
            curves.check(tmp_path / out)
    write(tmp_path / "none", range(0), end=None)
    with pytest.raises(ValueError, match="nothing to draw yet"):
        curves.draw([history.of(tmp_path / "none")], picture)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'esolm\[plot\]'"):
        curves.check(picture)
