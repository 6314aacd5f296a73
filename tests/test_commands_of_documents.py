"""The commands of the documents do what they say: the shell tells their words, and each is run on a small model."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import test_importers
from esolm import family
from esolm.cli import main
from test_documents import NO_HARNESS, ROOT, TEXT, all_blocks, each_page, place, understood  # noqa: F401
from test_hub_models import server  # noqa: F401  (a fixture)
from test_importing import BD3, published
from theirs_written import written

# Programs that say their words, each behind a NUL and all behind a line feed, in place of running.
SHELL = r"""
tell() { printf '%s\0' "$@"; printf '\n'; }
for name in esolm torchrun make pytest python python3 pip; do eval "$name() { tell $name \"\$@\"; }"; done
srun() { "$@"; }
scontrol() { echo node1; }
head() { read -r line; echo "$line"; }
.() { :; }
PATH=/nowhere SLURM_JOB_NODELIST=node1,node2 SLURM_NNODES=2 SLURM_JOB_ID=7
"""
SMALL = ["network.length=96", "network.width=32", "network.layers=1", "network.heads=2"]
SHORT = [
    "num_steps=2",
    "batch_size=4",
    "micro_batch=2",
    "validation_texts=2",
    "validate_every=2",
    "save_every=2",
    "sample_every=null",
]
LESS = {  # what makes a command of a page so small that a test can run it
    "bench": "--length 8 --vocab-size 32 --width 16 --layers 1 --heads 2 --repeats 1",
    "bench-training": "--widths 16 32 --lengths 8 16 --vocab-sizes 32 64 --ranks 1 --repeats 1 --width 16 --layers 1"
    " --heads 2 --length 8 --vocab-size 32 --batch-size 2",
    "evaluate": "--texts 4 --samples 1",
    "family": "--workers 1",
    "frontier": "--num 2 --num-steps 2",
}
OURS = {  # in place of megabytes of text, of a judge of another kind, and of what is on a cluster
    "classics": "books/",
    "shakespeare": "books/",
    "smollm2": "runs/ar",
    "hf:Skylion007/openwebtext": "books/",
    "/shared/gpt2": "gpt2/",
    "/shared/runs/owt": "runs/cluster",
    "/shared/runs/books": "runs/cluster",
}


def commands(block: str, folder: str = "/") -> list[list[str]]:
    """The words of each command of a block, by the shell itself: loops, variables, patterns of names in the folder."""
    words = ["bash", "-euc", SHELL + block]
    told = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    assert not told.returncode and not told.stderr, told.stderr
    return [line.split("\0")[:-1] for line in told.stdout.splitlines()]


def kubernetes(block: str, _: str = "/") -> list[list[str]]:
    """The commands of the containers of jobs."""
    yaml = pytest.importorskip("yaml", reason="THE JOB FOR KUBERNETES IS NOT READ: pip install pyyaml")
    parts = [part for part in yaml.safe_load_all(block) if part["kind"] == "Job"]
    return [pod["command"] for part in parts for pod in part["spec"]["template"]["spec"]["containers"]]


READ = {"sh": commands, "yaml": kubernetes}


@each_page
def test_commands_of_a_page_are_understood(path):
    for _, kind, block in all_blocks(path.read_text(encoding="utf-8")):
        for words in READ[kind](block) if kind in READ else []:
            _understood(words)


def _understood(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, check=True, timeout=60)
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/"))
    elif program == "torchrun":
        understood(_of_a_rank(rest))
    elif rest[:2] == ["-m", "esolm.harness"]:
        pytest.importorskip("lm_eval", reason=NO_HARNESS)
        from lm_eval._cli import HarnessCLI

        HarnessCLI()._parser.parse_args(["run", *rest[2:]])
    elif program == "esolm":
        understood(rest)
    else:
        assert program in ("python3", "pip")


def _of_a_rank(words: list[str]) -> list[str]:
    """What torchrun gives each rank, once it has understood its own options."""
    from torch.distributed.run import get_args_parser

    asked = get_args_parser().parse_args(words)
    assert asked.module and asked.training_script == "esolm"
    return asked.training_script_args


@pytest.mark.parametrize(
    "block",
    [
        "ls",
        "make nothing",
        "esolm samples runs/x",
        "esolm info runs/x --nothing",
        "pytest tests/test_nothing.py",
        "torchrun --nothing 3 -m esolm train",
        "torchrun --nproc-per-node 2 -m esolm train --nothing",
        "for m in a b; do esolm train --modell $m; done",
    ],
)
def test_a_command_that_is_not_there_is_noticed(block):
    with pytest.raises((AssertionError, KeyError, SystemExit, subprocess.CalledProcessError)):
        for words in commands(block):
            _understood(words)


def test_the_shell_tells_the_words_of_commands():
    block = 'for m in a "b c"; do\n    esolm train --model $m \\\n        --out "runs/$m"  # one each\ndone'
    assert commands(block) == [
        ["esolm", "train", "--model", "a", "--out", "runs/a"],
        ["esolm", "train", "--model", "b", "c", "--out", "runs/b c"],
    ]


@pytest.fixture
def there(place, server, tmp_path, monkeypatch):  # noqa: F811
    """A copy of the documents' folder, with all that their commands take for granted, and a Hub of ours."""
    folder = tmp_path / "reader"
    shutil.copytree(place, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    monkeypatch.setattr(test_importers, "VOCAB", 258)
    monkeypatch.setattr(family, "train", lambda *_, **__: None)  # sixteen processes; tests/test_family.py has them
    Path("tests").symlink_to(ROOT / "tests")
    shutil.copy("held-out.txt", "letters.txt")
    Path("held-out.txt").write_text(TEXT * 2)  # as much as MAUVE needs
    for name in ("gpt2", "family/tokens"):
        Path(name).mkdir(parents=True)
        shutil.copy("tokens/tokenizer.json", name)
    for member in family.MEMBERS:
        shutil.copytree("runs/ar" if member.name == "ar" else "runs/first", f"family/{member.name}")
    written(Path("old.ckpt"), algo=None)
    published(Path("bd3lm-owt-block_size16"), {**BD3, "vocab_size": 258}, test_importers.theirs(True))


@each_page
def test_commands_of_a_page_run(there, capsys, path, monkeypatch):
    """One after the other, as a reader would; what torchrun would start on many, here alone."""
    blocks = all_blocks(path.read_text(encoding="utf-8"))
    read = [READ[kind](block, ".") for mark, kind, block in blocks if kind in READ and not mark]
    for program, *words in [words for found in read for words in found]:
        if program in ("esolm", "torchrun"):
            capsys.readouterr()
            main(_smaller(words if program == "esolm" else _of_a_rank(words)))
            assert "--output" in words or "".join(capsys.readouterr()), words
        elif words[:2] == ["-m", "esolm.harness"]:
            pytest.importorskip("lm_eval", reason=NO_HARNESS)
            from esolm import harness

            monkeypatch.setattr(sys, "argv", ["lm_eval", *words[2:], "--limit", "2"])
            harness.main()
            assert "|hebrews_" in capsys.readouterr().out


def _smaller(words: list[str]) -> list[str]:
    """The same command on less text, a smaller network, fewer steps and draws."""
    name, more = words[0], LESS.get(words[0], "").split()
    words = [OURS.get(word, word) for word in words]
    if name == "train" and "--resume" not in words:
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)  # a run of the folder's own
        settings = words[words.index("--set") + 1 :] if "--set" in words else []
        words = words[: words.index("--set")] if settings else words
        words += [] if {"--from", "--tokenizer"} & {*words} else ["--vocab-size", "258"]
        words += [] if "--data" in words else ["--data", "books/"]
        more = ["--set", *settings, *SHORT, *(SMALL if "--from" not in words else [])]
    elif name == "plan":
        more = ["--set", *SMALL]
    elif name == "sample" and "--num" in words:
        Path(words[words.index("--output") + 1]).unlink(missing_ok=True)
        more = ["--num", "60"]  # MAUVE needs 50 that are not empty
    elif "--real" in words and (name == "frontier" or find_spec("mauve") is None):
        at = words.index("--real")  # MAUVE has tests of its own
        words = [*words[:at], *words[at + 2 :]]
    return [*words, *more]
