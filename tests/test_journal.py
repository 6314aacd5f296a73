"""The journal: every line is kept, a torn one is not, and the terminal is told how fast and how long."""

import io
import json
import math
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from esolm import journal as log
from esolm.journal import FILE, Journal, read
from esolm.sinks import Pace, Sink, TensorBoard, WeightsAndBiases


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


class Failing(Sink):
    def open(self, folder, *, resume, facts):
        self.sent = []

    def write(self, step, figures):
        if step == 2:
            raise ConnectionError("no route")
        self.sent.append(step)

    def text(self, step, name, text):
        pass

    def close(self):
        pass


def test_a_sink_that_fails_is_told_of_and_left_out_and_the_run_goes_on(tmp_path: Path) -> None:
    console, sink = quiet(), Failing()
    with Journal(tmp_path, sinks=[sink], console=console) as journal:
        for step in (1, 2, 3):
            journal.write(step, loss=1.0)
    assert sink.sent == [1]
    assert [entry["step"] for entry in read(tmp_path) if "loss" in entry] == [1, 2, 3]
    assert console.file.getvalue().count("Failing failed (no route)") == 1  # type: ignore[attr-defined]


def test_a_sink_that_fails_at_everything_is_told_of_once(tmp_path: Path) -> None:
    """What was to be said of it was sent to it too, and failed, and so on: RecursionError ended the run."""

    class Gone(Failing):
        def write(self, step, figures):
            raise ConnectionError("no route")

        def text(self, step, name, text):
            raise ConnectionError("no route")

    console, other = quiet(), Failing()
    with Journal(tmp_path, sinks=[Gone(), other, Gone()], console=console) as journal:
        for step in (1, 3):
            journal.write(step, loss=1.0)
    assert other.sent == [1, 3]
    assert [entry["step"] for entry in read(tmp_path) if "loss" in entry] == [1, 3]
    assert console.file.getvalue().count("Gone failed (no route)") == 2  # type: ignore[attr-defined]


def test_a_log_that_is_written_is_locked_and_a_second_run_keeps_out(tmp_path: Path) -> None:
    with Journal(tmp_path, console=quiet()):
        assert log.is_written(tmp_path)
        with pytest.raises(ValueError, match="another process is training in"):
            Journal(tmp_path, resume=0, console=quiet())
    assert not log.is_written(tmp_path)


def test_a_run_notes_its_beginning_and_how_it_ended(tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError), Journal(tmp_path, total=5, facts={"method": "AR"}, console=quiet()) as journal:
        journal.begin()
        journal.write(1, loss=1.0)
        raise ArithmeticError("too steep")
    first, _, last = figures(tmp_path)
    assert first == {"step": 0, "event": "began", "total": 5, "tokens_per_step": None, "method": "AR"}
    assert last == {"step": 1, "event": "died: too steep"}


FULL = """if True:
    import io, resource, signal, sys
    from pathlib import Path
    from rich.console import Console
    from esolm.journal import Journal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    console = Console(file=sys.stdout, width=200)
    with Journal(Path(sys.argv[1]), console=console) as journal:
        for step in range(1, 31):
            limit = 300 if step < 20 else resource.RLIM_INFINITY  # then somebody frees space
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            journal.write(step, loss=float(step))
"""


def test_lines_wait_in_memory_while_the_disk_is_full(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("its lines wait in memory") == 1
    assert [entry["loss"] for entry in read(tmp_path)] == list(range(1, 31))


def test_tensorboard_gets_every_figure_and_text(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume, steps in ((None, range(1, 6)), (3, range(4, 7))):
        with Journal(tmp_path, resume=resume, sinks=[TensorBoard()], console=quiet()) as journal:
            for step in steps:
                journal.write(step, loss=float(step) + (resume or 0))
            journal.text(steps[-1], "sample", "ROMEO.")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 3), (4, 7), (5, 8), (6, 9)]
    assert "sample/text_summary" in events.Tags()["tensors"]


def records_of(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's framing: blocks of 32 KiB, parts of (checksum, length, kind)."""
    at, parts = 7, b""  # after the file's own header
    while at + 7 <= len(data):
        left = -at % 2**15
        if left and left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_weights_and_biases_keeps_figures_and_texts_offline_and_a_resumed_run_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for resume, steps in ((None, (1, 2)), (2, (3,))):
        sinks = [WeightsAndBiases("plays")]
        with Journal(tmp_path, resume=resume, sinks=sinks, facts={"method": "AR"}, console=quiet()) as journal:
            for step in steps:
                journal.write(step, loss=step + 0.5)
            journal.text(steps[-1], "sample", "ROMEO.")
        time.sleep(1.1)  # it names its folders by the second
    found, ids, projects, tables = [], set(), set(), 0
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        for data in records_of(path.read_bytes()):
            record = records.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                projects.add(record.run.project)
            if record.WhichOneof("record_type") == "history":
                items = {item.nested_key[0] if item.nested_key else item.key: item for item in record.history.item}
                values = {key: json.loads(item.value_json) for key, item in items.items()}
                tables += "sample" in values
                if "loss" in values:
                    found.append((values["step"], values["loss"]))
    assert sorted(found) == [(1, 1.5), (2, 2.5), (3, 3.5)]
    assert len(ids) == 1 and projects == {"plays"} and tables == 2


@pytest.mark.parametrize(
    ("module", "sink", "extra"),
    [("torch.utils.tensorboard", TensorBoard, "tensorboard"), ("wandb", WeightsAndBiases, "wandb")],
)
def test_a_sink_whose_package_is_not_installed_is_told_with_the_remedy(monkeypatch, module, sink, extra) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"pip install 'esolm\[{extra}\]'"):
        sink()


def test_weights_and_biases_without_a_key_is_told_before_anything_begins(monkeypatch, tmp_path) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="WANDB_MODE=offline"):
        WeightsAndBiases()
