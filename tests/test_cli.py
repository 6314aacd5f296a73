"""The command line: help at once, the right exit code, and one clear line for every mistake."""

import errno
import json
import logging
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from esolm import checkpoint, cli, inference, journal, native, parts
from esolm.cli import writing
from esolm.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog and runs away. " * 60
SMALL = ("network.width=32", "network.layers=1", "network.heads=2", "network.length=32", "batch_size=4", "log_every=1")


@pytest.fixture
def run(capsys):
    def run_command(*arguments: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        try:
            cli.main([str(argument) for argument in arguments])
            found = 0
        except SystemExit as end:
            found = int(end.code or 0)
        out, err = capsys.readouterr()
        assert found == code, f"exit {found}: {err}"
        if code:
            assert "Traceback" not in err
        return out, err

    return run_command


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a very small run, trained through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT)
    options = ["--data", str(folder / "text.txt"), "--vocab-size", "258", "--out", str(folder / "run")]
    cli.main(["train", *options, "--set", *SMALL, "num_steps=3", "validation_texts=4"])
    return folder / "run"


def processor_seconds(code: str, *words: str) -> tuple[float, str]:
    """Of a Python process of its own, with what it printed."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime, done.stdout


@pytest.mark.parametrize("name", ["", *cli._COMMANDS])
def test_help_answers_within_half_a_second_without_torch(name):
    """In processor time, and best of five, since other tests share the machine; where that machine is slow, four times
    what the libraries alone take."""
    code = (
        "import sys; from esolm.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as end: assert not end.code"
        "\nassert 'torch' not in sys.modules"
    )
    stdout, times = "", [math.inf]
    while min(times) >= 0.5 and len(times) <= 5:
        seconds, stdout = processor_seconds(code, *name.split(), "--help")
        times.append(seconds)
    assert "usage: esolm" in stdout
    assert min(times) < 0.5 or min(times) < 4 * processor_seconds("import tyro, rich.console")[0]
    if name:
        assert f"esolm {name}" in stdout and "In Python:\n" in stdout
        assert "None" not in stdout.replace("NoneType", "") and "(default: )" not in stdout


@pytest.mark.parametrize("width", [80, 120])
def test_help_fits_the_terminal(monkeypatch, run, width):
    monkeypatch.setenv("COLUMNS", str(width))
    for name in cli._COMMANDS:
        out, _ = run(name, "--help")
        _, _, options = out.partition(" options ")
        assert "--help" in options and max(map(len, options.splitlines())) <= width
        for line, following in pairwise(options.splitlines()):  # a sentence goes on as long as there is room
            word = re.match("│ {8,}([a-z]\\S*)", following)
            if word and re.match("│ .* {2,}\\S", line):
                assert len(line.rstrip("│").rstrip()) + 1 + len(word[1]) > width - 4, line
        told, _, _ = out.partition("\n\nExamples:\n")
        assert max(map(len, told.splitlines())) <= width and "\n\n\n" not in out.partition("╭")[0]
    out, _ = run("--help")
    assert max(map(len, out.splitlines())) <= width and all(f"  {name} " in out for name in cli._COMMANDS)
    assert len({re.match("  [a-z-]+ +", line).end() for line in out.splitlines() if re.match("  [a-z-]+ +", line)}) == 1


def test_help_is_a_command_too_and_nothing_is_answered_with_it(run):
    assert run("help") == run("--help") == run(code=2)
    assert run("help", "sample") == run("sample", "--help")


def test_settings_are_listed_as_set_takes_them(run, trained, tmp_path):
    out, _ = run("train", "--model", "bd3lm", "--set", "help")
    keys = dict(line.split("=", 1) for line in out.splitlines())
    assert keys["algorithm.block_size"] == "16" and keys["optim.schedule.peak"] == "0.001"
    own = ("seed", "minutes", "network.vocab_size")
    settings = [line for line in out.splitlines() if line.partition("=")[0] not in own]
    text = trained.parent / "text.txt"
    run("train", "--data", text, "--out", tmp_path / "new", "--minutes", 0, "--set", *settings, code=2)


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "esolm", "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"esolm \d+\.\d+\.\d+\n", done.stdout)


def test_a_run_is_trained_resumed_and_continued(run, trained, tmp_path):
    assert (trained / "step-000000003").is_dir()
    run("train", "--resume", "--minutes", 5, "--out", trained)
    out = tmp_path / "next"
    text = trained.parent / "text.txt"
    run("train", "--from", trained, "--data", text, "--out", out, "--set", "num_steps=1", "batch_size=4")
    assert (out / "step-000000001").is_dir()


def test_the_same_command_begins_a_run_and_goes_on_with_it_and_refuses_another(run, tmp_path, monkeypatch):
    """As jobs that are started again need it; what torchrun starts again goes on by itself, without the option."""
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["train", "--data", tmp_path / "text.txt", "--vocab-size", 258, "--out", tmp_path / "run", "--minutes", 5]
    settings = ["--set", *SMALL, "num_steps=2", "validation_texts=4"]
    run(*command, "--auto-resume", *settings)
    first = (tmp_path / "run" / journal.FILE).read_text()
    run(*command, "--auto-resume", *settings)
    assert (tmp_path / "run" / journal.FILE).read_text().startswith(first)
    _, err = run(*command, *settings, code=2)
    assert "already holds a run" in err
    _, err = run(*command, "--auto-resume", *settings, "batch_size=3", code=2)
    assert "batch_size = " in err and "the options say 3: choose the same, or another --out" in err
    run(*command, "--auto-resume", *settings, "micro_batch=1")  # memory that is less than it was
    assert checkpoint.load(tmp_path / "run").state["micro_batch"] == 1
    _, err = run("train", "--resume", "--auto-resume", "--out", tmp_path / "run", code=2)
    assert "leave out --auto-resume" in err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(*command, *settings)


def test_ranks_without_a_place_to_meet_are_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, err = run("train", "--out", tmp_path / "run", code=2)
    assert err == "esolm: WORLD_SIZE is set but not RANK, MASTER_ADDR, MASTER_PORT: start several ranks with torchrun\n"


def test_samples_are_printed_plainly_as_json_or_to_a_file(run, trained, tmp_path):
    plain, _ = run("sample", trained, "--prompt", "The", "--dtype", "float32")
    assert plain.startswith("The") and "\x1b" not in plain
    lines, _ = run("sample", trained, "--prompt", "The", "--num", 3, "--json", "--dtype", "float32")
    records = [json.loads(line) for line in lines.splitlines()]
    assert len(records) == 3 and records[0]["text"] + "\n" == plain
    run("sample", trained, "--num", 2, "--output", tmp_path / "texts.jsonl")
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 2


def test_gaps_are_filled(run, trained):
    out, _ = run("infill", trained, "The ____ fox")
    assert out.startswith("The") and out.endswith(" fox\n")


def test_models_are_measured_told_about_and_checked(run, trained):
    data = ("--data", trained.parent / "text.txt")
    out, _ = run("evaluate", trained, *data, "--samples", 2, "--orders", 2, "--json")
    kinds = [json.loads(line)["kind"] for line in out.splitlines()]
    assert kinds == ["NELBO", "importance-weighted bound"]
    assert json.loads(run("evaluate", trained, "--json")[0])["kind"] == "NELBO"  # of what it held out
    out, _ = run("evaluate", trained, *data, "--dtype", "int8", "--json")
    assert json.loads(out)["name"] == f"{trained} in int8"
    out, _ = run("evaluate", trained, *data)
    assert "NELBO" in out and "bits/byte" in out
    out, _ = run("info", trained)
    assert "EsoLM" in out and "3 of 3 steps" in out and "text.txt" in out
    out, _ = run("info", trained, "--json")
    assert json.loads(out)["step"] == 3 and json.loads(out)["network"]["width"] == 32
    _, told = run("verify", trained)
    assert "step-000000003 is whole" in told


def test_the_table_is_there_after_each_checkpoint(run, trained, tmp_path):
    """Only the last checkpoint was followed by a table: whoever stopped before had none."""
    data = ("--data", trained.parent / "text.txt", "--samples", 1, "--texts", 4)
    run("evaluate", trained, tmp_path / "nothing", *data, "--out", tmp_path / "out", code=3)
    (row,) = json.loads((tmp_path / "out/table.json").read_text())
    assert row["name"] == str(trained) and (tmp_path / "out/table.md").read_text().count("\n") == 3
    run("evaluate", trained, trained, *data, "--out", tmp_path / "out")
    for others, code, count in (((tmp_path / "nothing",), 3, 2), ((), 0, 1)):  # cut short by its second; gone through
        run("evaluate", trained, *others, *data, "--out", tmp_path / "out", code=code)
        assert len(json.loads((tmp_path / "out/table.json").read_text())) == count
    (tmp_path / "out/table.json").write_text('[{"entropy": 5.0}]')
    _, err = run("evaluate", trained, *data, "--out", tmp_path / "out", code=2)
    assert "would be lost: choose another --out" in err


def test_every_step_of_a_run_is_checked(run, trained, tmp_path):
    for step, good in ((1, True), (2, False), (3, True)):
        folder = tmp_path / f"step-{step:09d}"
        shutil.copytree(trained / "step-000000003", folder)
        if not good:
            (folder / "config.json").write_text("{}")
    _, told = run("verify", tmp_path, code=3)
    assert "step-000000001 is whole" in told and "step-000000002/config.json is damaged" in told


def test_a_step_that_is_passed_over_is_told_of_in_one_line(run, trained, tmp_path):
    for step in (3, 4):
        shutil.copytree(trained / "step-000000003", tmp_path / f"step-{step:09d}")
    (tmp_path / "step-000000004" / "model.safetensors").write_bytes(b"")
    _, told = run("sample", tmp_path)
    assert re.fullmatch("esolm: warning: .*is damaged.*; falling back to step-000000003\n", told)


def test_text_is_tokenized(run, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    _, told = run("tokenize", tmp_path / "text.txt", "--out", tmp_path / "out", "--vocab-size", 270)
    assert "tokens of 1 documents" in told and (tmp_path / "out" / "tokenizer.json").exists()


def test_pairs_are_trained_on(run, tmp_path):
    rows = [json.dumps({"q": f"{n} plus {n}?", "answer": str(2 * n)}) for n in range(40)]
    (tmp_path / "qa.jsonl").write_text("\n".join(rows))
    options = ("--data", tmp_path / "qa.jsonl", "--pairs", "--field", "q", "--vocab-size", 258)
    run("train", *options, "--out", tmp_path / "run", "--set", *SMALL, "num_steps=2", "validation_texts=2")


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_mistake_is_one_line_in_every_locale(locale):
    """Frames of errors are drawn otherwise where there is no Unicode."""
    settings = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for words, told in (
        (["sample"], "missing CHECKPOINT; see"),
        (["sample", "RUN", "--num", "x"], "--num: expected a whole number, got 'x'; see"),
        (["sample", "RUN", "--num"], "--num needs a value; see"),
        (["sample", "RUN", "--nmu", "3"], "there is no option --nmu; did you mean '--num'?; see"),
        (["tokenize", "TEXT"], "missing --out PATH; see"),
    ):
        command = [sys.executable, "-m", "esolm", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
        assert (done.returncode, done.stderr) == (2, f"esolm: {told} esolm {words[0]} --help\n")


def test_a_model_and_the_tokenizer_of_another_are_not_joined(run, trained, tmp_path):
    """A checkpoint put together by hand, its manifest true."""
    saved = checkpoint.load(trained)
    other = Tokenizer.train([TEXT], 280).to_json()
    mixed = checkpoint.Checkpoint(step=1, model=saved.model, config=saved.config, tokenizer_json=other)
    checkpoint.save(tmp_path, mixed)
    _, err = run("sample", tmp_path, code=2)
    assert re.search("tokenizer has 280 ids and the network 258", err)


@pytest.mark.parametrize(
    ("command", "code"), [("train --data TEXT --out", 3), ("tokenize TEXT --out", 3), ("sample RUN --output", 3)]
)
def test_a_place_that_cannot_be_written_is_named(run, trained, command, code):
    places = {"TEXT": trained.parent / "text.txt", "RUN": trained}
    words = [places.get(word, word) for word in command.split()]
    size = ("--vocab-size", 258) if "RUN" not in command else ()
    _, err = run(*words, "/proc/nowhere/run", *size, code=code)
    assert "/proc/nowhere" in err and len(err.splitlines()) == 1


def test_a_full_disk_ends_a_run_with_a_line_and_loses_no_checkpoint(run, trained, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    text = trained.parent / "text.txt"
    options = ("--data", text, "--vocab-size", 258, "--out", tmp_path / "run", "--set", *SMALL, "num_steps=2")
    saves = iter([parts.save_file] * 2)  # of the first step: weights, averaged weights
    monkeypatch.setattr(parts, "save_file", lambda *args: next(saves, full)(*args))
    _, err = run("train", *options, "save_every=1", "optim.average=null", "validation_texts=2", code=3)
    assert re.search(r"could not save .*step-000000002: No space left on device; it needs .* MB", err)
    assert checkpoint.load(tmp_path / "run").step == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_under_the_texts_is_told(run, trained):
    _, err = run("sample", trained, "--output", "/dev/full", code=3)
    assert err == "esolm: no space left on device; free some space or choose another place\n"


def test_a_reader_that_goes_away_is_no_error(trained):
    """As `| head -1` does: the pipe's other end is closed after a line, and more is to come than a pipe holds."""
    command = [sys.executable, "-m", "esolm", "sample", str(trained), "--num", "1000", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("{")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    "problem", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory: 4 bytes\n more")]
)
def test_too_little_memory_is_told_in_one_line(run, trained, monkeypatch, problem):
    def too_large(*_: object) -> None:
        raise problem

    monkeypatch.setattr(writing, "loaded", too_large)
    _, err = run("sample", trained, code=1)
    assert "out of memory" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("json_too", [False, True])
def test_a_terminal_is_told_why_writing_is_slower(run, trained, monkeypatch, tmp_path, json_too):
    """`info` says it in either form, and what the modules log is one line of a terminal, but not beside JSON."""
    log = logging.getLogger("esolm")
    for name in ("handlers", "propagate"):
        monkeypatch.setattr(log, name, getattr(log, name))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", shutil.which("false"))
    monkeypatch.delenv("ESOLM_NATIVE", raising=False)
    native.found.cache_clear()
    inference.compiled.cache_clear()
    try:
        out, err = run("info", trained, *(["--json"] if json_too else []))
    finally:
        log.setLevel(logging.NOTSET)
        native.found.cache_clear()
        inference.compiled.cache_clear()
    why = json.loads(out)["no_engine"] if json_too else next(line for line in out.splitlines() if "engine" in line)
    assert "false failed (exit 1): name another compiler" in why
    lines = [line.split(",")[0] for line in err.splitlines()]
    told = ["esolm: compiling the engine for this processor", "esolm: no compiled engine"]
    assert lines == ([] if json_too else told)


def test_a_bug_shows_where_it_is(run, trained, monkeypatch):
    def wrong(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(writing, "loaded", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        run("sample", trained)


def test_ctrl_c_ends_with_its_exit_code(run, trained, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "loaded", interrupted)
    _, err = run("sample", trained, code=130)
    assert "interrupted" in err
