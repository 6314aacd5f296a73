"""The journal: every line is kept, a torn one is not, and the terminal is told how fast and how long."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
from rich.console import Console

from esolm.journal import FILE, Journal, Pace, read


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def figures(folder: Path) -> list[dict[str, object]]:
    return [{key: value for key, value in entry.items() if key != "time"} for entry in read(folder)]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    with Journal(tmp_path, console=quiet()) as journal:
        journal.write(1, loss=5.25, tokens=128)
        journal.text(1, "sample", "O Romeo,\n[bold]é[/]")
    assert figures(tmp_path) == [
        {"step": 1, "loss": 5.25, "tokens": 128},
        {"step": 1, "name": "sample", "text": "O Romeo,\n[bold]é[/]"},
    ]


def test_every_line_is_on_its_way_to_disk_before_the_next_step(tmp_path: Path) -> None:
    journal = Journal(tmp_path, console=quiet())
    journal.write(1, loss=1.0)
    assert len(read(tmp_path)) == 1
    journal.close()
    journal.close()


def test_figures_that_are_not_finite_survive_and_the_file_stays_json(tmp_path: Path) -> None:
    with Journal(tmp_path, console=quiet()) as journal:
        journal.write(1, loss=math.nan, norm=math.inf, other=-math.inf)
    (entry,) = read(tmp_path)
    assert math.isnan(entry["loss"]) and entry["norm"] == math.inf and entry["other"] == -math.inf
    json.loads((tmp_path / FILE).read_text(), parse_constant=pytest.fail)


def test_resuming_drops_what_lies_beyond_the_step(tmp_path: Path) -> None:
    with Journal(tmp_path, console=quiet()) as journal:
        for step in range(1, 6):
            journal.write(step, loss=float(step))
    with Journal(tmp_path, resume=3, console=quiet()) as journal:
        journal.write(4, loss=40.0)
    assert [entry["loss"] for entry in read(tmp_path)] == [1.0, 2.0, 3.0, 40.0]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_dropped_on_reading_and_on_resuming(tmp_path: Path, cut: int) -> None:
    with Journal(tmp_path, console=quiet()) as journal:
        journal.write(1, loss=1.0)
        journal.write(2, loss=2.0)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-cut])
    assert [entry["step"] for entry in read(path)] == [1]
    with Journal(tmp_path, resume=2, console=quiet()) as journal:
        journal.write(3, loss=3.0)
    assert [entry["step"] for entry in read(path)] == [1, 3]


def test_a_damaged_line_inside_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"step": 1}\n{"step":\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        read(tmp_path)


def test_a_new_run_does_not_write_into_the_log_of_another(tmp_path: Path) -> None:
    Journal(tmp_path, console=quiet()).close()
    with Journal(tmp_path, console=quiet()) as journal:
        journal.write(1, loss=1.0)
    with pytest.raises(ValueError, match="resume it, or choose another folder"):
        Journal(tmp_path, console=quiet())


def test_plain_lines_come_every_few_seconds_with_speed_and_time_left(tmp_path: Path) -> None:
    now = [0.0]
    console = quiet()
    with Journal(
        tmp_path, total=100, tokens_per_step=1000, console=console, every=10.0, clock=lambda: now[0]
    ) as journal:
        for step in range(1, 31):
            now[0] = float(step)
            journal.write(step, loss=2.0, secret=1.0)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[1] for line in lines] == ["1/100", "11/100", "21/100"]
    assert lines[-1] == "step 21/100 loss 2 · 1,000 tokens/s · 1:19 left"


def test_in_a_terminal_a_bar_is_kept_up_to_date(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Journal(tmp_path, total=10, console=console) as journal:
        journal.write(10, loss=1.5)
    assert "loss 1.5" in console.file.getvalue() and "10/10" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_pace_forgets_what_is_older_than_its_window() -> None:
    pace = Pace(total=1000, window=10.0)
    assert pace.steps_per_second is None and pace.seconds_left is None
    for second in range(100):
        pace.tick(float(second), second)
    for second in range(100, 120):
        pace.tick(float(second), 99 + (second - 99) * 5)
    assert pace.steps_per_second == pytest.approx(5.0)
    assert pace.seconds_left == pytest.approx((1000 - 199) / 5)


def test_tensorboard_that_is_not_installed_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'esolm\[tensorboard\]'"):
        Journal(tmp_path / "new", tensorboard=True, console=quiet())
    assert not (tmp_path / "new").exists()
