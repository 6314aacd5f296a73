"""A method from outside the package does all that ours do: the file of the tutorial, as its text has it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from esolm import cli, outside, recipes
from esolm.algorithms import Request
from esolm.algorithms.algorithm import Batch
from esolm.objective import scores_of_view
from esolm.sample import Writer
from slow import network

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/tutorials/adding-a-model.md").read_text(encoding="utf-8")
FILE, USE, SUM = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
(LINES,) = re.findall(r"^```sh\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
SMALL = "--set network.width=32 network.layers=1 network.heads=2 network.length=96 batch_size=4"
TINY = {  # what keeps a line of the tutorial within a second
    "train": f"--vocab-size 258 {SMALL} num_steps=3 validation_texts=4 log_every=1",
    "evaluate": "--texts 4",
    "bench": "--length 16 --width 32 --layers 1 --heads 2 --vocab-size 64 --repeats 1",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("outside")
    (place / "random_order.py").write_text(FILE)
    (place / "books").mkdir()
    words = "It was here when he left, and it was there when he came back again. " * 60
    for name in ("books/one.txt", "books/two.txt", "held-out.txt"):
        (place / name).write_text(words)
    return place


def call(place: Path, line: str) -> subprocess.CompletedProcess:
    """A command line in a process of its own, which knows no class of the tutorial."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    words = [sys.executable, "-m", "esolm", *shlex.split(line)[1:]]
    return subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=240)


def python_call(place: Path, code: str, files: Path) -> subprocess.CompletedProcess:
    """Python code that finds the tutorial's file in a folder."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{files}", "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-c", code]
    return subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=240)


def test_the_file_has_at_most_eighty_lines():
    assert len(FILE.splitlines()) <= 80


def test_every_line_of_the_tutorial_runs_and_a_checkpoint_alone_runs_no_code(place):
    """Each line in a process of its own. The resumed run was stopped by its time: it goes on to its last step."""
    for line in LINES.splitlines():
        command = shlex.split(line)[1]
        resumed = "--resume" in line
        said = call(place, line if resumed else f"{line} {TINY.get(command, '')}")
        assert said.returncode == 0, f"{line}: {said.stderr}"
        assert "Traceback" not in said.stderr and (said.stdout or command == "train")
    told = call(place, "esolm info runs/random --with random_order.py").stdout
    assert "RandomOrder" in told
    for line in ("esolm info runs/random", "esolm train --resume --out runs/random"):
        alone = call(place, line)
        assert alone.returncode == 2 and "--with" in alone.stderr and "'RandomOrder'" in alone.stderr
        assert "Traceback" not in alone.stderr
    python = python_call(place, USE + "\nassert model.length == 96", place)
    assert python.returncode == 0 and python.stdout, python.stderr


def test_its_probabilities_sum_to_one_and_a_row_that_reads_its_target_is_noticed(place):
    def total(file: str) -> float:
        (place / "sum").mkdir(exist_ok=True)
        (place / "sum/random_order.py").write_text(file)
        told = python_call(place, SUM, place / "sum")
        assert told.returncode == 0, told.stderr
        return float(re.search(r"tensor\(([\d.]+)", told.stdout)[1])

    assert total(FILE) == pytest.approx(1, abs=1e-4)
    assert abs(total(FILE.replace("twice(rank, rank)", "twice(rank, rank - 1)")) - 1) > 1e-2


def test_the_sampler_writes_a_text_with_the_probability_that_one_pass_gives_it(place):
    """Teacher forcing through the sampler and its cache, in orders it draws itself, with a given token."""
    method = outside.bring(str(place / "random_order.py")).RandomOrder()
    denoiser, num = network(length=6, vocab_size=9), 20
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 8, (num, 6)))
    requests = [Request(length=6, given={1: int(tokens[n, 1])}, seed=n, stop_at_end=False) for n in range(num)]
    orders: dict[int, list[int]] = {n: [1] for n in range(num)}
    writer, total = Writer(denoiser, method, requests), torch.zeros(num, dtype=torch.float64)
    while writer.active:
        with torch.inference_mode():
            hidden, row, rank = writer.evaluate()
            logits = denoiser.logits(hidden).double()[:, :-1]
        by_rank = [writer._plans.order[r, k] for r, k in zip(row, rank, strict=True)]
        for text, position in zip(row.tolist(), by_rank, strict=True):
            orders[text].append(int(position))
        wanted = tokens[torch.from_numpy(row), torch.tensor(by_rank)]
        total.index_add_(0, torch.from_numpy(row), logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0])
        writer.accept(row, rank, wanted.numpy())
    assert len({tuple(order) for order in orders.values()}) > 5
    given = torch.zeros_like(tokens).bool()
    given[:, 1] = True
    batch = Batch(tokens=tokens, given=given, valid=torch.ones_like(given))
    with torch.inference_mode():
        once = scores_of_view(denoiser, method.exact(batch, torch.tensor(list(orders.values())), 8)).double().sum(1)
    torch.testing.assert_close(-once, total, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("gone.py", None, "there is no file"),
        ("bad.py", "x = 1\ndef (", "bad.py, line 2: SyntaxError"),
        ("raises.py", "x = 1\ny = 1 / 0\n", "raises.py, line 2: ZeroDivisionError"),
        ("nonsuch_module_of_nobody", None, "ModuleNotFoundError"),
    ],
)
def test_a_file_that_cannot_be_brought_is_one_line(tmp_path, name, text, says):
    path = str(tmp_path / name) if name.endswith(".py") else name
    if text is not None:
        Path(path).write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)) as found:
        outside.bring(path)
    assert text is None or path in str(found.value)


def test_with_needs_a_value_and_an_unknown_method_says_how_to_bring_one(capsys):
    for arguments, says in ((["info", "run", "--with"], "--with needs"), (["bench", "--methods", "mdml"], "'mdlm'")):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert says in said and "--with" in said
    with pytest.raises(ValueError, match="did you mean 'mdlm'"):
        recipes.method("mdln")
