"""Checkpoints that mean harm, their digests true: nothing in them runs, each ends in one line, soon, in little memory.

Each is read in a fork that may take 200 MB more than it has. Files of others (training files): test_hostile_files.py.
The last test reads the package's own source: nothing in it can call what a file says.
"""

import ast
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esolm import checkpoint, plain, seal
from test_structure import FILES, TREES, each, imports

CANARY = "canary"
MEGABYTES = 200
SECONDS = 2  # of the processor: what a busy machine makes of them is no failure
HANGS = 300  # seconds by the clock after which whatever waits, without work, is ended

# Reads each of many checkpoints in a fork with little memory: how it ended, what it told, how long it worked.
READER = """if True:
    import json, os, resource, signal, sys
    from pathlib import Path
    import torch
    from esolm import cli
    import esolm.evaluate, esolm.model, esolm.prepare, esolm.recipes, esolm.train, esolm.corpus, esolm.history
    from esolm.denoiser import Config
    from esolm.optim import Config as Optim
    esolm.memory.needed(Config(vocab_size=4, length=4, width=8, layers=1, heads=1), Optim())  # imports a great deal

    torch.set_num_threads(1)
    for number, (words, place) in enumerate(json.loads(sys.argv[2])):
        told = Path(sys.argv[1]) / f"told-{number}"
        child = os.fork()
        if not child:
            signal.alarm(int(sys.argv[4]))
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[3]) * 2**20,) * 2)
            os.chdir(place)
            file = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, 2), os.dup2(file, 1)
            code = 0
            try:
                cli.main(words)
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                import traceback
                traceback.print_exc()
                code = 99
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        _, status, used = os.wait4(child, 0)
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        print(json.dumps([code, told.read_text(errors="replace"), used.ru_utime + used.ru_stime]))
"""


class Harm:
    """What leaves a canary when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


HARM = pickle.dumps(Harm(), 2)


def put(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda step: (step / name).write_bytes(content) and None


def tensors(header: bytes | dict, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape: list, start: int, stop: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def sparse(name: str, size: int, begin: bytes = b"") -> Callable[[Path], None]:
    """A file of a size that takes no room on disk."""

    def make(step: Path) -> None:
        with (step / name).open("wb") as file:
            file.write(begin)
            file.truncate(size)

    return make


def linked(name: str, target: str) -> Callable[[Path], None]:
    def make(step: Path) -> None:
        outside = step.parent.parent / target
        (step / name).rename(outside) if not outside.exists() else None
        (step / name).unlink(missing_ok=True)
        (step / name).symlink_to(outside)

    return make


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(step: Path) -> None:
        (step / name).unlink()
        make(step / name)

    return replace


def listed(name: str) -> Callable[[Path], None]:
    """A manifest that lists a name from elsewhere, its digest true."""

    def make(step: Path) -> None:
        manifest = plain.parse((step / seal.MANIFEST).read_text())
        manifest["files"][name] = {"size": 4, "sha256": "0" * 64}
        rewrite(step, manifest)

    return make


def changed(key: str, value: object) -> Callable[[Path], None]:
    def make(step: Path) -> None:
        config = plain.parse((step / "config.json").read_text())
        (step / "config.json").write_text(plain.render({**config, key: value}))

    return make


def rewrite(step: Path, manifest: dict) -> None:
    import hashlib

    manifest.pop("sha256")
    body = plain.render(manifest).removesuffix("\n}\n") + ",\n"
    digest = hashlib.sha256(body.encode()).hexdigest()
    (step / seal.MANIFEST).write_bytes(body.encode() + seal._last_line(digest))


WEIGHTS, OPTIM = "model.safetensors", "optim/shard-00000.safetensors"
DEEP = b"[" * 10**6
ONE = struct.pack("<f", 1.0)
TRUE = {  # sealed anew after the change: only what is inside is wrong
    **{
        f"a pickle as {name}": put(name, HARM)
        for name in (WEIGHTS, "ema.safetensors", OPTIM, "config.json", "state.json", "tokenizer.json")
    },
    "a header of 100 MB": sparse(WEIGHTS, 10**8 + 16, struct.pack("<Q", 10**8) + b"{"),
    "a header of 2^63 bytes": put(WEIGHTS, tensors(b"{}", length=2**63)),
    "a header longer than the file": put(WEIGHTS, tensors(b"{}", length=1000)),
    "overlapping offsets": put(WEIGHTS, tensors({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, ONE)),
    "a gap": put(WEIGHTS, tensors({"a": entry([1], 4, 8)}, ONE * 2)),
    "negative shapes": put(WEIGHTS, tensors({"a": entry([-1, -1], 0, 4)}, ONE)),
    "a negative offset": put(WEIGHTS, tensors({"a": entry([1], -4, 0)}, ONE)),
    "a shape of 2^62": put(WEIGHTS, tensors({"a": entry([2**31, 2**31], 0, 4)}, ONE)),
    "a thousand sides": put(WEIGHTS, tensors({"a": entry([1] * 1000, 0, 4)}, ONE)),
    "a duplicate key": put(WEIGHTS, tensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), ONE)),
    "an unknown dtype": put(WEIGHTS, tensors({"a": entry([1], 0, 4, "OBJECT")}, ONE)),
    "a header that is a list": put(WEIGHTS, tensors(b"[1]")),
    "a header a million deep": put(WEIGHTS, tensors(b'{"a":' + DEEP)),
    "a header with a true size": put(WEIGHTS, tensors({"a": entry([True], 0, 4)}, ONE)),
    "optimizer offsets beyond the file": put(OPTIM, tensors({"a": entry([10**6], 0, 4 * 10**6)}, ONE)),
    **{f"{name} a million deep": put(name, b'{"a":' + DEEP) for name in ("config.json", "state.json")},
    "tokenizer.json a million deep": put("tokenizer.json", DEEP),
    "a number of a million digits": put("config.json", b'{"network": ' + b"9" * 10**6 + b"}"),
    "not a number": put("config.json", b'{"network": NaN}'),
    "a duplicate key in config.json": put("config.json", b'{"network": 1, "network": 2}'),
    "config.json of 20 MB": sparse("config.json", 20 * 2**20, b'{"a": "'),
    "tokenizer.json of 70 MB": sparse("tokenizer.json", 70 * 2**20, b'{"a": "'),
    "a class to be run": changed("algorithm", {"type": "os.system", "command": "touch canary"}),
    "a network of 10^14 weights": changed(
        "network", {"vocab_size": 258, "length": 8, "width": 2**20, "layers": 9, "heads": 1}
    ),
    "a run of text": changed("run", "import os"),
    "a network of text": changed("network", "import os"),
    "config.json that is a list": put("config.json", b"[]"),
    "config.json that is not UTF-8": put("config.json", b"\xff\xfe{}"),
}
FALSE = {  # the manifest is what is wrong, or what it is about
    "a pickle as manifest.json": put("manifest.json", HARM),
    "manifest.json a million deep": put("manifest.json", DEEP),
    "a manifest of 100 MB": sparse("manifest.json", 10**8, b"{"),
    "a name above": listed("../outside.safetensors"),
    "an absolute name": listed("/etc/passwd"),
    "a name inside another folder": listed("optim/../config.json"),
    "a pickle's name": listed("optim.pkl"),
    "a link to the weights": linked(WEIGHTS, "elsewhere.safetensors"),
    "a link to a file of the system": linked("config.json", "../../../../../etc/passwd"),
    "a link to a folder": instead(OPTIM, lambda path: (path.parent.rmdir(), path.parent.symlink_to("/tmp"))),
    "a pipe": instead("config.json", os.mkfifo),
    "a folder": instead("config.json", Path.mkdir),
    "a device": instead("state.json", lambda path: path.symlink_to("/dev/zero")),
}
CASES = {**TRUE, **FALSE}
# Sound files that say what cannot be: a class may be known to the user (2, with --with as the remedy), a network may
# not be the run's (2) or not fit into memory (1).
PLAIN = ("a class to be run", "a network of text", "a network of 10^14 weights", "a run of text")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> dict[str, Path]:
    """A folder for every case, with `run/step-000000001` in it."""
    from esolm.algorithms import AR
    from esolm.denoiser import Config, Denoiser
    from esolm.tokenizer import Tokenizer
    from esolm.train import Run, description
    from test_cli import TEXT  # of the command line's tests

    network = Config(vocab_size=258, length=8, width=8, layers=1, heads=1)
    weights = dict(Denoiser(network).named_parameters())
    sound = {
        "model": weights,
        "ema": weights,
        "optim": {f"exp_avg.{name}": tensor for name, tensor in weights.items()},
        "config": description(Run(algorithm=AR(), network=network, num_steps=1)),
        "tokenizer_json": Tokenizer.bytes().to_json(),
        "state": {"seconds": 0.0, "origin": {"data": "text.txt", "pairs": False}},
    }
    whole = checkpoint.save(tmp_path_factory.mktemp("sound") / "run", checkpoint.Checkpoint(step=1, **sound))
    places = {}
    for number, (name, spoil) in enumerate(CASES.items()):
        place = tmp_path_factory.mktemp(f"hostile-{number}")
        (place / "text.txt").write_text(TEXT)
        step = Path(shutil.copytree(whole, place / "run" / whole.name))
        spoil(step)
        if name in TRUE:
            names = [str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()]
            seal.seal(step, [inner for inner in names if inner != seal.MANIFEST], step=1)
        places[name] = place
    return places


def read(folder: Path, plan: list[tuple[list[str], Path]]) -> list[tuple[int, str, float]]:
    """How each command in each place ended: exit code, what was told, seconds of the processor."""
    told = [(words, str(place)) for words, place in plan]
    command = [sys.executable, "-c", READER, str(folder), json.dumps(told), str(MEGABYTES), str(HANGS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def assert_refused(places: dict[str, Path], found: dict[str, tuple[int, str, float]]) -> float:
    """The longest that any took."""
    for name, (code, told, seconds) in found.items():
        if name == "a run of text" and code == 0:
            continue  # who only writes or scores does not ask what the run was
        assert code == 3 or (name in PLAIN and code in (1, 2)), f"{name}: exit {code}: {told}"
        assert told.startswith("esolm: ") and len(told.splitlines()) == 1, f"{name}: {told}"
        assert len(told) < 1000 and seconds < SECONDS, name
    assert not [name for name, place in places.items() if list(place.rglob(CANARY))]
    return max(seconds for _, _, seconds in found.values())


def test_a_hostile_checkpoint_runs_nothing_and_ends_in_one_line(hostile, tmp_path):
    sound = tmp_path.parent / "sound0"
    *found, read_well = read(tmp_path, [(["info", "run"], place) for place in (*hostile.values(), sound)])
    assert_refused(hostile, dict(zip(hostile, found, strict=True)))
    assert read_well[0] == 0  # in the same memory


def test_the_canary_sings_where_a_pickle_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(HARM)
    assert (tmp_path / CANARY).exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_command_that_reads_a_checkpoint_refuses_every_hostile_one(hostile, tmp_path):
    commands = ("info run", "sample run", "infill run __", "evaluate run --data text.txt", "train --resume --out run",
                "train --data text.txt --from run --out new")  # fmt: skip
    for command in commands:
        (tmp_path / command.split()[0]).mkdir(exist_ok=True)
        begins = "--from" in command  # with the weights alone: what the run and its method were is not asked
        asked = {name: place for name, place in hostile.items() if not (begins and name in PLAIN)}
        found = read(tmp_path / command.split()[0], [(command.split(), place) for place in asked.values()])
        longest = assert_refused(asked, dict(zip(asked, found, strict=True)))
        told = f"{len(found)} of {len(found)} refused with exit 3, in {longest:.2f} s of the processor at most"
        print(f"esolm {command}: {told}")


# -- the package's own source ------------------------------------------------------------------------------

FORBIDDEN_MODULES = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "copyreg")
FORBIDDEN_CALLS = ("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.package", "eval", "exec",
                   "compile", "__import__", "pandas.read_pickle", "pd.read_pickle", "yaml.load", "FileSystemReader",
                   "FileSystemWriter")  # fmt: skip


def running(tree: ast.AST) -> Iterator[str]:
    """What in a source could run what a file says."""
    for name, line in imports(tree):
        if name.split(".")[0] in FORBIDDEN_MODULES or name.startswith(("torch.load", "torch.save", "torch.package")):
            yield f"line {line}: imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in FORBIDDEN_CALLS or called.split(".")[-1] in FORBIDDEN_CALLS[-2:]:
                yield f"line {node.lineno}: calls {called}"
            if called in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
                yield f"line {node.lineno}: calls {called} without allow_pickle=False"
            if options.get("trust_remote_code", "False") != "False" or options.get("weights_only", "True") != "True":
                yield f"line {node.lineno}: {called} trusts what it reads"


@each(FILES)
def test_nothing_in_the_package_can_run_what_a_file_says(path):
    assert list(running(TREES[path])) == []


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "from torch import load",
     "np.load('x')", "np.load('x', allow_pickle=True)", "eval(text)", "exec(text)", "from torch import package",
     "AutoModel.from_pretrained('x', trust_remote_code=True)", "dcp.FileSystemReader('x')", "import joblib"],
)  # fmt: skip
def test_what_could_run_is_found(line):
    if line == "from torch import package":
        line = "import torch.package"
    assert list(running(ast.parse(line)))
