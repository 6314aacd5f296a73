"""Sixty mistakes and more, over every command: the right exit code, at most three lines, the culprit and what to do.

Each is made in this process; the full form makes each in a process of its own, as a user would.
"""

import contextlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from esolm import cli, plain, seal
from esolm.tokenizer import Tokenizer
from test_cli import SMALL, TEXT

# What tells a user how to go on: the right word, what a value must be, where to read, or what to do.
STEP = re.compile(
    "did you mean|see esolm|must (be|lie|end)|at least|is one of|expected|--help|esolm [a-z]+ |leave out|needs? |give|"
    "choose|use |upgrade|mark|convert|copy|read it|move|make|remove|resume|shorten|name |free|go with|lists|takes"
)
MISTAKES = [
    # sampling, scores, training
    ("smaple RUN", 2, "did you mean 'sample'"),
    ("--verison", 2, "did you mean '--version'"),
    ("sample", 2, "missing CHECKPOINT; see esolm sample --help"),
    ("infill", 2, "missing CHECKPOINT and TEXT"),
    ("tokenize TEXT", 2, "missing --out PATH"),
    ("sample RUN more", 2, "there is no place for more"),
    ("sample RUN --promt x", 2, "there is no option --promt; did you mean '--prompt'"),
    ("sample RUN --num", 2, "--num needs a value"),
    ("sample RUN --num x", 2, "--num: expected a whole number, got 'x'"),
    ("sample RUN --alpha-0 x", 2, "--alpha-0: expected a number, got 'x'"),
    ("sample RUN --dtype fp16", 2, "--dtype is one of auto, float32.*did you mean 'float16'"),
    ("sample RUN --alpha-0 1.5", 2, r"alpha_0 must lie in \[0, 1\]"),
    ("sample RUN --num-steps 0", 2, "num_steps must be at least 1"),
    ("sample RUN --length 33", 2, "longer than the model's 32"),
    ("sample RUN --prompt LONG", 2, "the prompt has .* tokens"),
    ("sample RUN --top-p 0", 2, "top_p must lie in"),
    ("sample RUN --temperature -1", 2, "temperature must be"),
    ("sample RUN --device cuba", 2, "there is no device 'cuba'"),
    ("sample RUN --device cuda:77", 2, "there is no device 'cuda:77' here: use cpu"),
    ("sample RUN --device meta", 2, "there is no device 'meta'"),
    ("sample RUN --seed -1", 2, r"seed must lie in \[0, 2\^43\), got -1"),
    ("sample RUN --num 0", 2, "num must be at least 1"),
    ("sample NOWHERE", 3, "no checkpoint at .*; there is no such folder"),
    ("sample EMPTY", 3, "no checkpoint in .*; expected a folder like step-"),
    ("info CUT", 3, "model.safetensors is damaged"),
    ("verify CUT", 3, "damaged"),
    ("infill RUN nothing", 2, "no blank in"),
    ("infill RUN __ --tokens 0", 2, "tokens must be at least 1"),
    ("infill RUN __ --tokens 33", 2, "the model holds 32"),
    ("evaluate", 2, "at least one checkpoint"),
    ("evaluate RUN --data TEXT --orders -1", 2, "orders must be at least 1"),
    ("evaluate RUN --data TEXT --texts -1", 2, "texts must be at least 1"),
    ("evaluate RUN --data LATIN", 3, "is not UTF-8"),
    ("evaluate RUN --data NOWHERE", 3, "there is no file"),
    ("evaluate RUN --data EMPTYFILE", 3, "every document is empty"),
    ("train --data NOWHERE --out NEW", 3, "there is no file"),
    ("train --data EMPTYFILE --out NEW", 3, "every document is empty"),
    ("train --data LATIN --out NEW", 3, "is not UTF-8: byte 0xe9 at offset 3"),
    ("train --data TEXT --out NEW --set network.widht=3", 2, "did you mean 'width'"),
    ("train --data TEXT --out NEW --set width=3", 2, "did you mean 'network.width'"),
    ("train --data TEXT --out NEW --set", 2, "--set needs KEY=VALUE"),
    ("train --set --out NEW", 2, "--set help lists the keys"),
    ("bench --methods --json", 2, "--methods needs a value"),
    ("train --data TEXT --out NEW --set network.width", 2, "--set takes key=value"),
    ("train --data TEXT --out NEW --set network.width=x", 2, "network.width: expected int, got 'x'"),
    ("train --data TEXT --out NEW --set seed=1", 2, "use --seed"),
    ("train --data TEXT --out NEW --set nothing=1", 2, "--set help lists the keys"),
    ("train --data TEXT --out NEW --answer reply", 2, "needs --pairs"),
    ("train --data TEXT --out NEW --pairs", 3, "prompts and answers come as JSON lines"),
    ("train --data TEXT --out NEW --device cuda:77", 2, "there is no device"),
    ("train --data TEXT --out NEW --from NOWHERE", 3, "no checkpoint at"),
    ("train --data TEXT --out NEW --from RUN --tokenizer OTHER", 2, "has vocab_size = 258, this run 280"),
    ("train --data TEXT --out NEW --from RUN --vocab-size 300", 2, "leave out --vocab-size"),
    ("train --data TEXT --out NEW --alpha-0 2", 2, r"alpha_0 must lie in \[0, 1\]"),
    ("train --data TEXT --out NEW --model ar --alpha-0 0.5", 2, "ar has no alpha_0"),
    ("train --data TEXT --out NEW --model bd3lm --block-size 7", 2, "not divisible by block_size 7"),
    ("train --data TEXT --out NEW --vocab-size 10", 2, "vocab_size must be at least 258"),
    ("train --data TEXT --out NEW --tokenizer NOWHERE", 3, "there is no tokenizer at"),
    ("train --resume --out EMPTY", 3, "no checkpoint in"),
    ("train --resume --out NOWHERE", 3, "there is no such folder"),
    ("train --resume --out RUN --alpha-0 0.5 --data TEXT", 2, "as it began: leave out --alpha-0, --data"),
    ("train --resume --out RUN --from RUN", 2, "leave out --from"),
    ("train --data TEXT --out RUN", 2, "already holds a run|another text"),
    ("train --validation 2 --data TEXT --out NEW", 2, r"must lie in \(0, 1\)"),
    ("train --recipe demmo", 2, "did you mean 'demo'"),
    ("tokenize EMPTYFILE --out NEW", 3, "every document is empty"),
    ("tokenize LATIN --out NEW", 3, "is not UTF-8"),
    ("demo --minutes 0", 2, "minutes must be positive"),
    # verbs
    ("tokenise TEXT", 2, "no command 'tokenise'; did you mean 'tokenize'"),
    ("bench-trainig", 2, "did you mean 'bench-training'"),
    ("help smaple", 2, "did you mean 'sample'"),
    # a checkpoint's state
    ("sample RUN --alpha 0.5", 2, "no option --alpha; did you mean '--alpha-0'"),
    ("sample RNU", 3, "no checkpoint at .*rnu; there is no such folder; did you mean 'run'"),
    ("sample AFILE", 3, "there is no such folder"),
    ("sample NEWER", 3, "manifest.json has format 2, this version reads format 1; upgrade esolm"),
    ("sample OLDER", 3, "manifest.json has format 0, this version reads format 1; read it with the older"),
    ("sample RUN --output EMPTY", 3, "cannot write to .*empty: is a directory; choose a file"),
    ("sample RUN --output TEXT", 2, "exists already and would be lost: remove it, or choose another"),
    ("infill RUN", 2, "missing TEXT; see esolm infill --help"),
    ("infill RUN __ --tokesn 3", 2, "did you mean '--tokens'"),
    ("info FLIP", 3, "model.safetensors is damaged: expected sha256 .*, found .*; copy it again"),
    ("info NOWHERE", 3, "no checkpoint at"),
    ("info BADCONFIG", 3, "the network in config.json of .* cannot be: .*those of the weights 258, 32, 1"),
    ("verify", 2, "missing CHECKPOINT; see esolm verify --help"),
    ("push RUN tales", 2, "'tales' is no name of a repository: give owner/name"),
    ("push FLIP ann/tales", 3, "model.safetensors is damaged"),
    ("push RUN ann/tales --licence mit", 2, "did you mean '--license'"),
    ("export NOWHERE --out NEW", 3, "no checkpoint at"),
    ("export RUN", 2, "missing --out"),
    ("export RUN --out TEXT", 3, "exists already and would be lost"),
    ("plan --memory 80", 2, "memory must be a size with a unit, as 80GB"),
    ("plan --memory lots", 2, "memory must be a size with a unit, .* got .lots."),
    ("plan --ranks 0 --memory 80GB", 2, "ranks"),
    ("verify EMPTY", 3, "no checkpoint in .*; expected a folder like step-"),
    ("verify FLIP", 3, "model.safetensors is damaged: expected sha256 .*, found .*; copy it again"),
    ("verify LESS", 3, "tokenizer.json is missing; copy it again"),
    ("verify MORE", 3, "notes.txt is not in the manifest; move it elsewhere"),
    # the models of others
    ("import NOWHERE --out NEW", 3, "there is no .*: give a training file, or a folder"),
    ("import TEXT --out NEW", 3, "cannot read .*text.txt: it is no file that torch.save wrote"),
    ("import EMPTY --out NEW", 3, "a folder without config.json: give a training file"),
    ("import TEXT", 2, "missing --out PATH"),
    ("import TEXT --out NEW --alpha-0 0.5", 2, "--alpha-0 and --block-size go with --model"),
    ("import TEXT --out NEW --model esolm-b", 2, "--model esolm-b needs --alpha-0"),
    ("import TEXT --out NEW --model esolm-c", 2, "there is no method 'esolm-c'; did you mean 'esolm-b'"),
    ("import TEXT --out NEW --weights emma", 2, "--weights is one of raw, ema, got 'emma'; did you mean 'ema'"),
    # logs
    ("runs NOWHERE", 3, "there is no folder .*nowhere: give one that holds runs"),
    ("runs --jsno", 2, "did you mean '--json'"),
    ("runs TEXT", 3, "there is no folder .*text.txt: give one that holds runs"),
    ("plot", 2, "give at least one run: esolm plot RUN"),
    ("plot EMPTY", 3, "empty holds no run"),
    ("plot TORNLOG", 3, "line 2 of .*journal.jsonl is damaged; remove it"),
    ("plot RUN --out picture.xyz", 2, "a picture must end in .png, .svg, .pdf, got 'picture.xyz'"),
    ("plot RUN --out /proc/nowhere/p.png", 2, "there is no folder /proc/nowhere for the picture: make it first"),
    # judges
    ("judge", 2, "give at least one file of texts: esolm judge FILE"),
    ("judge NOWHERE", 3, "there is no file"),
    ("judge LATIN", 3, "is not UTF-8"),
    ("judge TORN", 3, "line 2 of .*torn.jsonl is not JSON"),
    ("judge TEXT --by smolm2", 2, "there is no judge 'smolm2'; did you mean 'smollm2'"),
    ("judge TEXT --by NOWHERE", 3, "there is no judge at .*nowhere: give a folder"),
    ("judge TEXT --by RUN", 2, "whose likelihood is a bound: a judge must be autoregressive"),
    ("judge TEXT --by AR --length 0", 2, "length must be at least 1"),
    ("judge TEXT --by AR --real NOWHERE", 3, "there is no file"),
    ("frontier RUN", 2, "missing --out PATH"),
    ("frontier NOWHERE --out NEW --by AR", 3, "no checkpoint at"),
    ("frontier RUN --out NEW --by RUN", 2, "a judge must be autoregressive"),
    ("frontier RUN --out NEW --by AR --num-steps -1 --num 2", 2, "num_steps must be at least 1, got -1"),
    ("frontier RUN --out NEW --by AR --num 0", 2, "num and batch must be at least 1, got 0 and 8"),
    ("frontier RUN --out NEW --by AR --batch 0 --num 2", 2, "batch must be at least 1"),
    ("frontier RUN --out NEW --by AR --alpha-0 1.5 --num 2", 2, r"alpha_0 must lie in \[0, 1\], got 1.5"),
    ("frontier RUN --out NEW --by AR --plot p.xyz", 2, "a picture must end in .png"),
    ("family --workers 0 --out NEW", 2, "workers must be at least 1, got 0"),
    ("family --workers two", 2, "--workers: expected a whole number, got 'two'"),
    ("family --vocab-size 10 --out NEW", 2, "vocab_size must be at least 258"),
    # speeds
    ("bench --methods esolm-c", 2, "there is no method 'esolm-c'; did you mean 'esolm-b'"),
    ("bench --repeats 0", 2, "repeats must be at least 1, got 0"),
    ("bench --batch 0", 2, "batch must be at least 1, got 0"),
    ("bench --plot p.xyz", 2, "a picture must end in .png"),
    ("bench --dtype int4", 2, "--dtype is one of .*, got 'int4'; did you mean 'int8'"),
    ("bench --alpha-0 1.5", 2, r"alpha_0 must lie in \[0, 1\], got 1.5"),
    ("bench --device cuda", 2, "there is no device 'cuda' here: use cpu"),
    ("bench-training --repeats 0", 2, "repeats must be at least 1, got 0"),
    ("bench-training --batch-size 0", 2, "batch_size must be at least 1, got 0"),
    ("bench-training --width 33", 2, "width 33 must be divisible by heads 6"),
    ("demo --minutes x", 2, "--minutes: expected a number, got 'x'"),
    ("demo --out AFILE", 3, "afile.*: not a directory; choose another place"),
    # scores
    ("evaluate CUT --data TEXT", 3, "model.safetensors is damaged: expected .* bytes, found"),
    ("evaluate RUN --data ROWS", 3, "line 1 of .*rows.jsonl has no field 'text'; it has q: name the right one"),
    ("evaluate RUN --data TEXT --out AFILE", 3, "not a directory; choose another place"),
    ("evaluate RUN --data TEXT --samples 0", 2, "samples must be at least 1"),
    ("evaluate RUN --data TEXT --context 32", 2, "context must be smaller than the model's length 32"),
    ("evaluate RUN --dtype float61", 2, "did you mean 'float16'"),
    # training
    ("train --data TEXT --out AFILE", 3, "afile: not a directory; choose another place"),
    ("train --data TEXT --out NEW --device cuda", 2, "there is no device 'cuda' here: use cpu"),
    ("train --data TEXT --out NEW --tokenizer BADJSON", 3, "cannot read the tokenizer .*bad.json"),
    ("train --data TEXT --out NEW --model esolm-d", 2, "there is no method 'esolm-d'; did you mean"),
    ("train --data TEXT --out NEW --set dtype=float16", 2, "dtype: expected one of .*; did you mean 'bfloat16'"),
    ("train --data TEXT --out NEW --set network.width=33", 2, "width 33 must be divisible by heads 6"),
    ("train --data TEXT --out NEW --set batch_size=0", 2, "batch_size must be at least 1"),
    ("train --data TEXT --out NEW --minutes -1", 2, "minutes must be positive, got -1.0"),
    ("train --data TEXT --out NEW --set=", 2, "--set takes key=value"),
    ("train --data TEXT --out NEW --block-size 4", 2, "esolm-b has no block size; bd3lm has"),
    ("train --data hf: --out NEW", 3, "names no data set: give hf:NAME"),
    ("train --data EMPTY --out NEW", 3, "there is no file in the folder .*: give one"),
    ("train --data ROWS --pairs --field q --out NEW", 3, "has no field 'answer'; it has q"),
    ("train --data TEXT --out NEW --from CUT", 3, "model.safetensors is damaged"),
    ("tokenize TEXT --out AFILE", 3, "afile: not a directory; choose another place"),
    ("tokenize TORN --out NEW", 3, "line 2 of .*torn.jsonl is not JSON"),
    ("tokenize TEXT --out RUN --vocab-size 300", 2, "has 258 ids, not 300: leave out --vocab-size"),
    ("tokenize TEXT --out NEW --tokenizer EMPTY", 3, "there is no tokenizer in .*: it needs tokenizer.json"),
]


@pytest.fixture(scope="session")
def places(tmp_path_factory) -> dict[str, str]:
    """What the words in capitals stand for."""
    root = tmp_path_factory.mktemp("mistakes")
    (root / "text.txt").write_text(TEXT)
    for name, method in (("run", "esolm-b"), ("ar", "ar")):
        options = ["--data", str(root / "text.txt"), "--vocab-size", "258", "--out", str(root / name)]
        cli.main(["train", *options, "--model", method, "--set", *SMALL, "num_steps=3", "validation_texts=4"])
    for name, content in {
        "nothing.txt": "",
        "afile": "mine",
        "bad.json": "{",
        "rows.jsonl": '{"q": "x"}\n',
        "torn.jsonl": '{"text": "x"}\n{"text": \n',
    }.items():
        (root / name).write_text(content)
    (root / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (root / "empty").mkdir()
    (root / "log").mkdir()
    (root / "log" / "journal.jsonl").write_text('{"step": 1, "loss": 2}\nrubbish\n{"step": 2, "loss": 2}\n')
    Tokenizer.train([TEXT], 280).save(root / "tokenizer.json")
    names = {"RUN": "run", "AR": "ar", "NOWHERE": "nowhere", "RNU": "rnu", "EMPTY": "empty", "EMPTYFILE": "nothing.txt"}
    names |= {"LATIN": "latin.txt", "TEXT": "text.txt", "NEW": "new", "OTHER": "tokenizer.json", "AFILE": "afile"}
    names |= {"BADJSON": "bad.json", "ROWS": "rows.jsonl", "TORN": "torn.jsonl", "TORNLOG": "log"}
    found = {word: str(root / name) for word, name in names.items()} | {"LONG": "word " * 100}
    return found | {name: str(spoilt(root, name)) for name in SPOILT}


def _cut(step: Path) -> None:
    weights = step / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def _flip(step: Path) -> None:
    raw = bytearray((step / "model.safetensors").read_bytes())
    raw[-5] ^= 1
    (step / "model.safetensors").write_bytes(raw)


def _resealed(step: Path, number: int) -> None:
    """The manifest of another version, its digest true."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal, "FORMAT", number)
        files = [path for path in step.rglob("*") if path.is_file() and path.name != seal.MANIFEST]
        seal.seal(step, [str(path.relative_to(step)) for path in files], step=3)


def _without_width(step: Path) -> None:
    config = plain.parse((step / "config.json").read_text())
    del config["network"]["width"]
    (step / "config.json").write_text(plain.render(config))
    _resealed(step, seal.FORMAT)


SPOILT = {
    "CUT": _cut,
    "FLIP": _flip,
    "NEWER": lambda step: _resealed(step, seal.FORMAT + 1),
    "OLDER": lambda step: _resealed(step, seal.FORMAT - 1),
    "LESS": lambda step: (step / "tokenizer.json").unlink(),
    "MORE": lambda step: (step / "notes.txt").write_text("mine"),
    "BADCONFIG": _without_width,
}


def spoilt(root: Path, name: str) -> Path:
    """A copy of the run's checkpoint with something wrong."""
    step = root / name.lower() / "step-000000003"
    shutil.copytree(root / "run" / step.name, step)
    SPOILT[name](step)
    return step


def in_process(words: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(words)
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def in_a_process_of_its_own(words: list[str]) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "esolm", *words], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def assert_told(found: tuple[int, str, str], code: int, words: str) -> None:
    ended, out, err = found
    assert ended == code, f"exit {ended}: {err}"
    assert "Traceback" not in err and not out
    assert len(err.splitlines()) == 1 and err.startswith("esolm: ")
    assert re.search(words, err), err
    assert STEP.search(err), f"no step to take: {err}"


def test_there_are_sixty_and_every_command_has_some():
    assert len({line for line, _, _ in MISTAKES}) == len(MISTAKES) >= 60
    lines = [line.split()[0] for line, _, _ in MISTAKES]
    assert [name for name in cli._COMMANDS if lines.count(name) < 3] == []


@pytest.mark.parametrize(("line", "code", "words"), MISTAKES, ids=[line for line, _, _ in MISTAKES])
def test_a_mistake_is_named_in_one_line_with_the_right_exit_code(places, line, code, words):
    shutil.rmtree(places["NEW"], ignore_errors=True)
    assert_told(in_process([places.get(word, word) for word in line.split()]), code, words)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_mistake_is_named_by_the_command_itself(places):
    for line, code, words in MISTAKES:
        shutil.rmtree(places["NEW"], ignore_errors=True)
        assert_told(in_a_process_of_its_own([places.get(word, word) for word in line.split()]), code, words)
    print(f"{len(MISTAKES)} of {len(MISTAKES)} mistakes: the right exit code, one line, the culprit and a step to take")


# What the machine does to a user: rights and disks. Root may write everywhere, so a user without rights tries.
HINDERED = """if True:
    import os, resource, signal, sys
    from esolm import cli, prepare, train
    if sys.argv[1] == "rights":
        os.getuid() or os.setuid(65534)
    else:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
    cli.main(sys.argv[2:])
"""


def hindered(how: str, *words: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", HINDERED, how, *words], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_folder_that_may_not_be_written_is_told_before_the_text_is_read(places, tmp_path):
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == tmp_path.owner() and folder.name.startswith(("pytest-", "popen-", "test_")):
            folder.chmod(0o755)  # may be entered by others
    (tmp_path / "locked").mkdir(mode=0o555)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    found = hindered("rights", "train", "--data", str(text), "--out", str(tmp_path / "locked" / "run"))
    assert_told(found, 3, "locked: permission denied; choose another place or make it writable")
    found = hindered("rights", "tokenize", str(text), "--out", str(tmp_path / "locked" / "run"))
    assert_told(found, 3, "locked: permission denied; choose another place or make it writable")


def test_a_disk_that_is_full_is_told(places, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    found = hindered("100000", "tokenize", str(text), "--out", str(tmp_path / "out"), "--vocab-size", "258")
    assert_told(found, 3, "file too large; free some space or choose another place")
    if Path("/dev/full").exists():
        found = in_process(["sample", places["RUN"], "--output", "/dev/full"])
        assert_told(found, 3, "no space left on device; free some space")


def test_a_package_that_is_not_there_is_told_before_the_text_is_read(places, monkeypatch):
    for package, option, words in (
        ("torch.utils.tensorboard", ["--tensorboard"], r"pip install 'esolm\[tensorboard\]'"),
        ("wandb", ["--wandb", "project"], r"pip install 'esolm\[wandb\]'"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        found = in_process(["train", "--data", places["NOWHERE"], "--out", places["NEW"], *option])
        assert found[0] == 2 and len(found[2].splitlines()) == 1 and re.search(words, found[2])
