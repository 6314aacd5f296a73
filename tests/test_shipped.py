"""The model that comes along: found by name in every place that takes a checkpoint, whole, small, and able to write."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import esolm
from esolm import checkpoint, cli, shipped
from esolm.algorithms import EsoLM

(NAME,) = shipped.MODELS


def test_it_is_whole_small_and_of_the_method_that_the_package_is_about():
    checkpoint.verify(Path(NAME))
    folder = shipped.located(NAME)
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 10e6
    model = esolm.load(NAME)
    assert isinstance(model.algorithm, EsoLM) and model.algorithm.variant == "B"


def test_its_averaged_weights_are_all_that_it_holds_and_they_are_rounded(tmp_path):
    saved = checkpoint.load(Path(NAME))
    assert saved.ema is None and not saved.optim
    assert {str(weight.dtype) for weight in saved.model.values()} == {"torch.bfloat16"}
    again = checkpoint.load(checkpoint.save(tmp_path, saved.rounded()))
    assert all(weight.equal(saved.model[name]) for name, weight in again.model.items())


def test_it_writes_mostly_words_that_shakespeare_or_the_bible_has():
    known = set()
    for path in ("shakespeare", "kjv"):
        for text in esolm.corpus.documents(esolm.corpus.shipped(path)):
            known.update(_words(text))
    written = [word for text in esolm.load(NAME).sample(8, temperature=0.8, top_p=0.9) for word in _words(text)]
    assert len(written) > 200
    assert sum(word in known for word in written) / len(written) > 0.9


def _words(text):
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def test_it_fills_a_gap_and_goes_on_from_a_prompt():
    model = esolm.load(NAME)
    filled = model.infill("To be, or ________, that is the question")
    assert filled.startswith("To be, or") and filled.endswith("that is the question")
    assert model.sample(prompt="ROMEO.")[0].startswith("ROMEO.")


def test_the_command_line_takes_its_name(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.")
    for words in (["sample", "--no-live"], ["info"], ["verify"], ["evaluate", "--data", "text.txt", "--samples", "1"]):
        command, *options = words
        cli.main([command, NAME, *options])  # exits where it fails
    out, err = capsys.readouterr()
    assert "2,048 ids" in out and "NELBO" in out and "is whole" in err


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / NAME).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in"):
        checkpoint.load(Path(NAME))


def test_a_name_that_is_nearly_right_is_told():
    with pytest.raises(checkpoint.CheckpointError, match=f"did you mean '{NAME}'"):
        checkpoint.load(Path("esolm-shakspeare"))


def test_its_card_says_what_it_is_good_for_its_figures_its_data_and_its_licence():
    told = shipped.card(NAME)
    for part in ("Good for", "Not good for", "bits a byte", "public domain", "Apache-2.0", "esolm.load"):
        assert part in told
    with pytest.raises(ValueError, match="no model 'x' comes with esolm"):
        shipped.card("x")


@pytest.mark.slow
def test_it_writes_from_a_wheel_in_an_environment_of_its_own(tmp_path):
    """The wheel carries the weights: installed apart from this tree, with this environment's libraries behind it."""
    root = Path(__file__).resolve().parent.parent
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, root], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    code = f"import esolm; print(esolm.__file__); print(esolm.load({NAME!r}).sample(prompt='ROMEO.')[0])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(tmp_path / "site")) and "ROMEO." in done.stdout
