"""The command line: help at once, the right exit code, and one clear line for every mistake."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from esolm import cli
from esolm.cli import writing

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


@pytest.mark.parametrize("name", ["", *cli._COMMANDS])
def test_help_answers_within_half_a_second_without_torch(name):
    """In processor time, and best of three, since other tests share the machine."""
    code = "import sys; from esolm.cli import main\ntry: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    times = []
    for _ in range(3):
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code, *name.split(), "--help"], capture_output=True, text=True, check=False
        )
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime)
        assert done.returncode == 0 and "usage: esolm" in done.stdout
    assert min(times) < 0.5
    if name:
        assert f"esolm {name} " in done.stdout and "In Python: " in done.stdout


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "esolm", "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"esolm \d+\.\d+\.\d+\n", done.stdout)


def test_a_run_is_trained_resumed_and_continued(run, trained, tmp_path):
    assert (trained / "step-000000003").is_dir()
    run("train", "--resume", "--out", trained)
    out = tmp_path / "next"
    text = trained.parent / "text.txt"
    run("train", "--from", trained, "--data", text, "--out", out, "--set", "num_steps=1", "batch_size=4")
    assert (out / "step-000000001").is_dir()


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
    out, _ = run("evaluate", trained, *data)
    assert "NELBO" in out and "bits/byte" in out
    out, _ = run("info", trained)
    assert "EsoLM" in out and "3 of 3 steps" in out
    run("verify", trained)


def test_text_is_tokenized(run, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    _, told = run("tokenize", tmp_path / "text.txt", "--out", tmp_path / "out", "--vocab-size", 270)
    assert "tokens of 1 documents" in told and (tmp_path / "out" / "tokenizer.json").exists()


def test_pairs_are_trained_on(run, tmp_path):
    rows = [json.dumps({"q": f"{n} plus {n}?", "answer": str(2 * n)}) for n in range(40)]
    (tmp_path / "qa.jsonl").write_text("\n".join(rows))
    options = ("--data", tmp_path / "qa.jsonl", "--pairs", "--field", "q", "--vocab-size", 258)
    run("train", *options, "--out", tmp_path / "run", "--set", *SMALL, "num_steps=2", "validation_texts=2")


MISTAKES = [
    ("smaple RUN", 2, "did you mean 'sample'"),
    ("sample RUN --promt x", 2, "--prompt"),
    ("sample RUN --alpha-0 1.5", 2, r"alpha_0 must lie in \[0, 1\]"),
    ("sample RUN --num-steps 0", 2, "num_steps must be at least 1"),
    ("sample RUN --length 33", 2, "longer than the model's 32"),
    ("sample RUN --prompt LONG", 2, "the prompt has .* tokens"),
    ("sample RUN --top-p 0", 2, "top_p must lie in"),
    ("sample RUN --temperature -1", 2, "temperature must be"),
    ("sample RUN --device cuba", 2, "there is no device 'cuba'"),
    ("sample RUN --num 0", 2, "num must be at least 1"),
    ("sample NOWHERE", 3, "no checkpoint at .*; there is no such folder"),
    ("sample EMPTY", 3, "no checkpoint in .*; expected a folder like step-"),
    ("info CUT", 3, "model.safetensors is damaged"),
    ("verify CUT", 3, "damaged"),
    ("infill RUN nothing", 2, "no blank in"),
    ("evaluate", 2, "at least one checkpoint"),
    ("evaluate RUN --data NOWHERE", 3, "there is no file"),
    ("evaluate RUN --data EMPTYFILE", 3, "every document is empty"),
    ("train --data NOWHERE --out NEW", 3, "there is no file"),
    ("train --data EMPTYFILE --out NEW", 3, "every document is empty"),
    ("train --data LATIN --out NEW", 3, "is not UTF-8: byte 0xe9 at offset 3"),
    ("train --data TEXT --out NEW --set network.widht=3", 2, "did you mean 'width'"),
    ("train --data TEXT --out NEW --set network.width", 2, "--set takes key=value"),
    ("train --data TEXT --out NEW --alpha-0 2", 2, r"alpha_0 must lie in \[0, 1\]"),
    ("train --data TEXT --out NEW --model ar --alpha-0 0.5", 2, "ar has no alpha_0"),
    ("train --data TEXT --out NEW --model bd3lm --block-size 7", 2, "not divisible by block_size 7"),
    ("train --data TEXT --out NEW --vocab-size 10", 2, "vocab_size must be at least 258"),
    ("train --data TEXT --out NEW --tokenizer NOWHERE", 2, "there is no tokenizer at"),
    ("train --resume --out EMPTY", 3, "no checkpoint in"),
    ("train --data TEXT --out RUN", 2, "already holds a run|another text"),
    ("train --validation 2 --data TEXT --out NEW", 2, r"must lie in \(0, 1\)"),
    ("train --recipe demmo", 2, "demo"),
]


@pytest.mark.parametrize(("line", "code", "words"), MISTAKES, ids=[line for line, _, _ in MISTAKES])
def test_a_mistake_is_named_in_one_line_with_the_right_exit_code(run, trained, tmp_path, line, code, words):
    cut = tmp_path / "cut"
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    if "CUT" in line:
        import shutil

        shutil.copytree(trained / "step-000000003", cut)
        weights = cut / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
    places = {
        "RUN": trained,
        "NOWHERE": tmp_path / "nowhere",
        "EMPTY": tmp_path / "empty",
        "CUT": cut,
        "EMPTYFILE": tmp_path / "nothing.txt",
        "LATIN": tmp_path / "latin.txt",
        "TEXT": trained.parent / "text.txt",
        "NEW": tmp_path / "new",
        "LONG": "word " * 100,
    }
    out, err = run(*[places.get(word, word) for word in line.split()], code=code)
    assert re.search(words, err.replace("\n", " "))
    assert len(err.strip().splitlines()) <= 12 and not out


def test_a_folder_that_cannot_be_written_is_named(run, trained):
    _, err = run(
        "train", "--data", trained.parent / "text.txt", "--out", "/proc/nowhere/run", "--vocab-size", 258, code=1
    )
    assert "/proc/nowhere" in err


def test_ctrl_c_ends_with_its_exit_code(run, trained, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "loaded", interrupted)
    _, err = run("sample", trained, code=130)
    assert "interrupted" in err
