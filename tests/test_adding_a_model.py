"""The tutorial of a sixth model does what it says: its one file, taken from the page, gets all that the five have."""

import itertools
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import esolm
from esolm import recipes
from esolm.algorithms import Request
from esolm.algorithms.algorithm import Batch
from esolm.cli import main
from esolm.draw import Draw
from esolm.likelihood import nelbo
from esolm.noise import Noise
from esolm.own import define
from esolm.sample import complete
from slow import Slow, _binomial, chi_square_p, network, unchecked

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
FILE, PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"^(esolm --with .*)$", PAGE, re.MULTILINE)
SMALL = "network.width=16 network.layers=1 network.heads=2 network.length=40 num_steps=3 batch_size=4 save_every=1"
QUICK = f"{SMALL} validate_every=3 validation_texts=2 dtype=float32"
LENGTH = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the file of the page, and the sixth model trained from there by the page's command."""
    place = tmp_path_factory.mktemp("sixth")
    (place / "cosine.py").write_text(FILE, encoding="utf-8")
    (place / "text.txt").write_text("ROMEO: To be, or not to be, that is the question. " * 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train = next(line for line in COMMANDS if " train --model" in line)
        data = "--data text.txt --vocab-size 258"
        main(shlex.split(f"{train} {data} --set {QUICK}")[1:])
    return place


@pytest.fixture
def there(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


def sixth():
    return recipes.method("CosineMDLM")


def test_the_file_is_one_of_at_most_80_lines():
    assert len(FILE.splitlines()) <= 80


@pytest.mark.parametrize("word", ["sample", "infill", "evaluate", "info"])
def test_the_commands_of_the_page_run(there, capsys, word):
    (line,) = (line for line in COMMANDS if f"cosine.py {word} " in line)
    main(shlex.split(line)[1:])
    told = capsys.readouterr().out
    assert told
    if word in ("info", "evaluate"):
        assert ("CosineMDLM" if word == "info" else "NELBO") in told


def test_it_is_timed_beside_the_others(there, capsys):
    (line,) = (line for line in COMMANDS if " bench " in line)
    tiny = "--length 8 --vocab-size 32 --width 16 --layers 1 --heads 2 --repeats 1 --json"
    main(shlex.split(f"{line} {tiny}")[1:])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "CosineMDLM" in json.dumps(lines)
    assert len(lines) >= 2


def test_its_training_goes_on_where_it_was(there, capsys):
    """Resumed runs are finished already here: the command says so by having the same last step."""
    (line,) = (line for line in COMMANDS if "--resume" in line)
    main(shlex.split(line)[1:])
    assert esolm.checkpoint.load(there / "runs/cosine", optimizer=False).step == 3


def test_the_python_of_the_page_runs(there, capsys):
    exec(PYTHON.replace("JULIET.\\n", "RO"), {})
    assert capsys.readouterr().out.startswith("RO")


def test_a_checkpoint_names_no_code_and_says_what_to_do(there, monkeypatch):
    """Loaded where nobody has defined the class, as in a new process."""
    from esolm import plain

    real = plain.classes
    monkeypatch.setattr(plain, "classes", lambda cls: {n: c for n, c in real(cls).items() if n != "CosineMDLM"})
    with pytest.raises(ValueError, match=r"'CosineMDLM' is not defined here: name the file .*esolm --with FILE"):
        esolm.load("runs/cosine")


def test_a_file_run_twice_defines_one_method(there):
    define("cosine.py")
    define("cosine.py")
    assert type(sixth()).__name__ == "CosineMDLM"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no file mine.py"),
        ("x = 1\ny = 1 / 0\n", r"mine.py cannot be run: ZeroDivisionError: .* \(line 2 of mine.py\)"),
        ("def f(:\n", "mine.py cannot be run: SyntaxError"),
        ("import no_such_thing_at_all", "there is no module no_such_thing_at_all"),
    ],
)
def test_a_file_that_cannot_be_run_is_said_in_one_line(tmp_path, monkeypatch, capsys, text, words):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("mine.py").write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["--with", "mine.py", "info", "nowhere"])
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert re.search(words, told)
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--with", "--with needs a value"),
        ("--with no_such_module info x", "there is no module no_such_module"),
        ("train --model CosineMDML --out new", "there is no method 'CosineMDML'.*did you mean 'CosineMDLM'"),
        ("train --model esolmb --out new", "there is no method 'esolmb'.*did you mean 'esolm-b'"),
        ("train --model CosineMDLM --alpha-0 0.5 --out new", "CosineMDLM has no alpha_0"),
    ],
)
def test_a_name_that_is_none_is_answered_with_the_nearest(there, capsys, line, words):
    define("cosine.py")
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 2
    assert re.search(words, capsys.readouterr().err)


def test_the_weights_of_its_bound_add_up_to_one_token_each(there):
    """E[weight * masked] = 1 for every token: what makes the sum of weighted losses a bound."""
    define("cosine.py")
    texts = torch.zeros(4000, 8, dtype=torch.long)
    noise = Noise(seed=0, step=0, start=0, stop=len(texts), total=len(texts))
    for views in (sixth().views(Batch.of(texts), noise, 3), sixth().bound(Batch.of(texts), noise, 3)):
        (view,) = views
        assert float(view.weights.double().mean()) == pytest.approx(1, abs=0.15)  # heavy tails near t = 0


def widths(count: int, num_steps: int):
    """How many positions each step writes, by the cosine schedule, with the probability of that."""
    alphas = [1 - math.cos(math.pi / 2 * (step / num_steps)) for step in range(num_steps + 1)]
    shares = [(later - now) / (1 - now) for now, later in itertools.pairwise(alphas)]
    for counts in itertools.product(range(count + 1), repeat=num_steps):
        left, probability = count, 1.0
        for revealed, share in zip(counts, shares, strict=True):
            probability *= _binomial(revealed, left, min(1.0, share))
            left -= revealed
        if probability:
            yield probability, tuple(filter(None, counts))


@pytest.mark.parametrize("num_steps", [2, 3])
def test_the_sampler_writes_what_enumeration_says_and_all_texts_have_probability_one(there, num_steps):
    define("cosine.py")
    with unchecked():
        denoiser = network(seed=3)
        slow, expected = Slow("MDLM", denoiser), torch.zeros(3**LENGTH, dtype=torch.float64)
        for probability, steps in widths(LENGTH, num_steps):
            orders = list(itertools.permutations(range(LENGTH)))
            for order in orders:
                cuts = np.cumsum((0, *steps))
                plan = tuple(("diffusion", tuple(sorted(order[a:b]))) for a, b in itertools.pairwise(cuts))
                expected += probability / len(orders) * slow.log_probabilities(plan, ()).exp()
        assert float(expected.sum()) == pytest.approx(1, abs=1e-9)
        num = 4000
        how = {"length": LENGTH, "num_steps": num_steps, "draw": Draw(), "stop_at_end": False}
        written = complete(denoiser, sixth(), [Request(seed=seed, **how) for seed in range(num)])
        powers = 3 ** np.arange(LENGTH - 1, -1, -1)
        counts = np.bincount([int(text.tokens @ powers) for text in written], minlength=3**LENGTH)
    assert chi_square_p(torch.from_numpy(counts), expected * num) > 1e-3


def test_its_bound_is_one(there):
    """The NELBO of every text, summed over texts as probabilities of a distribution, is at most one."""
    define("cosine.py")
    denoiser = network(seed=1)
    texts = torch.tensor(list(itertools.product(range(3), repeat=LENGTH)))
    total = torch.zeros(len(texts), dtype=torch.float64)
    draws = 400
    with unchecked():
        for step in range(draws):
            noise = Noise(seed=0, step=step, start=0, stop=len(texts), total=len(texts))
            total += nelbo(denoiser, sixth(), Batch.of(texts), noise)
    assert float((-total / draws).exp().sum()) < 1
