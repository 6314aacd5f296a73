"""Models of the Hub: the library itself, against a server here that answers as the Hub does."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import esolm
from esolm import checkpoint, hub, share
from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.card import card
from esolm.checkpoint import CheckpointError
from esolm.denoiser import Config, Denoiser
from esolm.model import Model
from esolm.plain import to_plain
from esolm.tokenizer import Tokenizer
from stand_in import serving
from test_cli import run  # noqa: F401  (a fixture)

library = pytest.importorskip("huggingface_hub", reason="HUGGINGFACE_HUB IS NOT INSTALLED: pip install 'esolm[hub]'")
pytest.importorskip("huggingface_hub.constants")
NETWORK = Config(vocab_size=258, length=16, width=16, layers=1, heads=2)
NAME = "someone/tiny"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The Hub, empty, and nothing of it on this machine; no folder here is called as an owner."""
    with serving() as there:
        constants = library.constants
        monkeypatch.setattr(constants, "ENDPOINT", there.address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", there.address + "".join(template[1:]))
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        yield there


@pytest.fixture
def step(tmp_path) -> Path:
    return saved(tmp_path / "runs" / "tiny")


def saved(folder: Path, seed: int = 0, step: int = 7, validation: float = 1.25, network: Config = NETWORK) -> Path:
    """A step of a run with averaged weights and an optimizer's state."""
    model = Denoiser(network, torch.Generator().manual_seed(seed))
    weights = dict(model.state_dict())
    return checkpoint.save(
        folder,
        checkpoint.Checkpoint(
            step=step,
            model={name: weight + 1 for name, weight in weights.items()},
            ema=weights,
            optim={"moment": torch.ones(3)},
            config={"network": to_plain(network), "algorithm": to_plain(EsoLM(alpha_0=0.25))},
            tokenizer_json=Tokenizer.bytes().to_json(),
            state={"validation": validation, "origin": {"data": "/home/me/secret/books", "pairs": False}},
        ),
    )


def files_of(step: Path) -> dict[str, bytes]:
    return {path.relative_to(step).as_posix(): path.read_bytes() for path in step.rglob("*") if path.is_file()}


def logits(model: Model) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in model.denoiser.state_dict().values()])


# -- fetching ----------------------------------------------------------------------------------------------


def test_a_name_is_fetched_once_and_is_the_same_model(server, step):
    server.commit(NAME, files_of(step) | {"README.md": b"a card", ".gitattributes": b"", "notes/x.py": b"print()"})
    model = esolm.load(NAME, dtype="float32")
    assert logits(model).equal(logits(esolm.load(step, dtype="float32")))
    taken = [path for path in server.paths("GET") if "/resolve/" in path]
    assert taken and not [path for path in taken if path.endswith((".md", ".py", ".gitattributes"))]
    esolm.load(NAME)
    assert [path for path in server.paths("GET") if "/resolve/" in path] == taken
    checkpoint.verify(Path(NAME))


def test_a_revision_is_a_branch_or_a_commit(server, step, tmp_path):
    other = saved(tmp_path / "other", seed=1)
    first = server.commit(NAME, files_of(step))
    server.commit(NAME, files_of(other), branch="trial")
    kept = [logits(esolm.load(path, dtype="float32")) for path in (step, other)]
    for revision, expected in ((first, kept[0]), ("main", kept[0]), ("trial", kept[1])):
        assert logits(esolm.load(f"{NAME}@{revision}", dtype="float32")).equal(expected)
    with pytest.raises(CheckpointError, match=f"{NAME} of the Hub has no revision 'trail'"):
        esolm.load(f"{NAME}@trail")


def test_a_path_comes_first_and_a_mistyped_path_is_no_name(server, step, tmp_path):
    server.commit("runs/tiny", {})
    assert esolm.load("runs/tiny")  # the folder that is here
    with pytest.raises(CheckpointError, match="no such folder; did you mean 'tiny'"):
        esolm.load("runs/tyni")
    assert not server.asked


def test_what_the_hub_does_not_have_is_one_line(server, run):  # noqa: F811
    _, err = run("info", "nobody/nothing", code=3)
    assert "no checkpoint nobody/nothing: there is no such folder here and no such repository" in err
    server.commit("theirs/mdlm", {"config.json": b"{}", "model.safetensors": b""})
    _, err = run("sample", "theirs/mdlm", code=3)
    assert "holds no checkpoint of esolm" in err and "esolm import theirs/mdlm --out DIR" in err
    assert not [path for path in server.paths("GET") if "/resolve/" in path]  # nothing large is fetched for that
    assert err.count("esolm: ") == 1 and err.splitlines()[-1].startswith("esolm: ")  # after the library's own bars


def test_without_a_net_what_is_kept_is_read_and_the_rest_is_told(server, step, monkeypatch):
    server.commit(NAME, files_of(step))
    esolm.load(NAME)
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", True)
    asked = len(server.asked)
    assert esolm.load(NAME)
    with pytest.raises(CheckpointError, match="none is kept, and HF_HUB_OFFLINE is set"):
        esolm.load("someone/else")
    assert len(server.asked) == asked
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(library.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    assert esolm.load(NAME)
    with pytest.raises(CheckpointError, match="none is kept, and the Hub cannot be reached"):
        esolm.load("someone/else")


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path, monkeypatch):
    monkeypatch.setattr(library.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # 10 MB: more than there is here
    step = saved(tmp_path / "runs" / "tiny")
    server.commit(NAME, files_of(step))
    server.breaks_off_after = 5000
    assert logits(esolm.load(NAME, dtype="float32")).equal(logits(esolm.load(step, dtype="float32")))
    assert server.breaks_off_after is None
    ranges = [headers["range"] for verb, _, headers in server.asked if verb == "GET" and "range" in headers]
    assert any(asked.startswith("bytes=") and asked != "bytes=0-" for asked in ranges)


def test_a_download_that_is_killed_is_done_by_the_next_process(server, step, tmp_path):
    """What arrived whole stays; a small file that was under way begins anew (of a large one: test_partial.py)."""
    folder = share.pack(step, tmp_path / "packed", NAME)
    server.commit(NAME, files_of(folder))
    server.stalls_after = 5000
    settings = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "new"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "esolm", "info", NAME]
    env = {**os.environ, **settings}
    killed = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    blobs = tmp_path / "new/hub/models--someone--tiny/blobs"
    try:
        assert server.stalled.wait(120)
        whole, deadline = len(_FETCHED) - 1, time.monotonic() + 60  # the others come beside it
        while len(_arrived(blobs)) < whole and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        killed.kill()
        killed.wait()
        server.released.set()
    assert len(_arrived(blobs)) == whole and not (tmp_path / "new/esolm").exists()
    asked = len(server.asked)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "alpha_0=0.25" in done.stdout, done.stderr
    fetched = [(path, headers.get("range")) for verb, path, headers in server.asked[asked:] if verb == "GET"]
    (weights,) = [each for each in fetched if "/resolve/" in each[0]]
    assert weights[0].endswith("/model.safetensors") and weights[1] in (None, "bytes=0-")


_FETCHED = ("manifest.json", "config.json", "tokenizer.json", "state.json", "model.safetensors")


def _arrived(blobs: Path) -> list[Path]:
    return [path for path in blobs.glob("*") if path.suffix != ".incomplete"]


def test_a_flipped_bit_on_the_hub_is_refused_and_named(server, step):
    files = files_of(step)
    content = bytearray(files["model.safetensors"])
    content[-5] ^= 16
    server.commit(NAME, files | {"model.safetensors": bytes(content)})
    with pytest.raises(CheckpointError, match=r"is damaged on the Hub itself.*model\.safetensors.*expected sha256"):
        esolm.load(NAME)
    assert not list((Path("home") / "esolm").glob("*/*"))


def test_a_bit_flipped_in_what_is_kept_is_found_and_fetched_again(server, step):
    """The plain file and the library's are one on a disk with links: both are bad then."""
    number = server.commit(NAME, files_of(step))
    esolm.load(NAME)
    kept = Path("home") / "esolm" / "someone--tiny" / number / "model.safetensors"
    content = bytearray(kept.read_bytes())
    content[-5] ^= 16
    kept.write_bytes(content)
    assert logits(esolm.load(NAME, dtype="float32")).equal(logits(esolm.load(step, dtype="float32")))


def test_settings_of_the_environment_are_obeyed(server, step, tmp_path):
    """In a process of its own: the mirror, the token of a private repository, the home."""
    server.commit(NAME, files_of(step))
    server.private.add(NAME)
    settings = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "new"), "HF_HUB_DISABLE_XET": "1"}

    def told(**more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "esolm", "info", NAME]
        env = {**os.environ, **settings, **more}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    refused = told()
    assert refused.returncode == 3 and "no such repository on the Hub (for a private one" in refused.stderr
    assert "alpha_0=0.25" in told(HF_TOKEN="secret").stdout
    assert (tmp_path / "new" / "esolm").is_dir()


def test_a_run_that_goes_on_is_here_and_a_fetched_one_brings_no_text(server, step, run):  # noqa: F811
    server.commit(NAME, files_of(step))
    _, err = run("train", "--resume", "--out", NAME, code=3)
    assert "there is no such folder" in err and not server.asked
    _, err = run("evaluate", NAME, code=2)
    assert "does not come with it: give a text to score (--data)" in err


# -- putting there -----------------------------------------------------------------------------------------


def test_what_is_pushed_is_what_is_fetched(server, step, run):  # noqa: F811
    _, err = run("push", "runs/tiny", NAME, "--license", "apache-2.0")
    assert f"is at {server.address}/{NAME}; write with it: esolm sample {NAME}" in err
    there = server.commits[server.repositories[NAME]["main"]]
    assert "ema.safetensors" not in there and not [path for path in there if path.startswith("optim/")]
    assert logits(esolm.load(NAME, dtype="float32")).equal(logits(esolm.load(step, dtype="float32")))
    told = there["README.md"].decode()
    assert 'license: "apache-2.0"' in told and "secret" not in told and "books" in told and "1.250 nats" in told
    assert f'esolm.load("{NAME}")' in told


def test_a_run_that_saves_meanwhile_gets_the_card_of_the_step_that_goes(step, tmp_path, monkeypatch):
    """It was read twice: once to be sent, once for its card."""
    load = checkpoint.load

    def load_while_it_trains(path, **options):
        found = load(path, **options)
        saved(step.parent, step=found.step + 1, validation=0.5)
        return found

    monkeypatch.setattr(checkpoint, "load", load_while_it_trains)
    folder = share.pack(step.parent, tmp_path / "packed", NAME)
    assert folder.name == step.name and checkpoint.newest(step.parent) != step
    assert "1.250 nats" in (folder / "README.md").read_text(encoding="utf-8")


def test_all_of_a_run_may_be_pushed_and_an_older_file_goes(server, step, run, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", "secret")
    run("push", "runs/tiny", NAME, "--optimizer", "--private")
    assert NAME in server.private
    there = server.commits[server.repositories[NAME]["main"]]
    assert {"ema.safetensors", "optim/shard-00000.safetensors"} < there.keys()
    assert not [path for path, content in there.items() if b"secret" in content]
    assert b"books" in there["state.json"]
    server.private.clear()
    run("push", "runs/tiny", NAME, "--revision", "small")
    small = server.commits[server.repositories[NAME]["small"]]
    assert not {"ema.safetensors", "optim/shard-00000.safetensors"} & small.keys()
    assert esolm.load(f"{NAME}@small")


def test_of_a_mixture_too_the_folders_of_its_data_stay_here(step, tmp_path):
    sources = [{"data": data, "pairs": False} for data in ("/home/me/secret/books/", "hf:owner/name", "classics")]
    origin = {"sources": sources, "weights": [3.0, 2.0, 1.0]}
    known = checkpoint.load(step)
    mixed = checkpoint.save(tmp_path / "mixed", replace(known, state={**known.state, "origin": origin}))
    folder = share.pack(mixed, tmp_path / "packed", NAME, whole=True)
    assert b"secret" not in b"".join(files_of(folder).values())
    (folder / "README.md").unlink()  # it is no part of a checkpoint
    found = checkpoint.load(folder).state
    assert [source["data"] for source in found["origin"]["sources"]] == ["books", "hf:owner/name", "classics"]
    assert found["origin"]["weights"] == [3.0, 2.0, 1.0] and found["validation"] == 1.25


def test_a_dry_run_shows_the_card_and_sends_nothing(server, step, run):  # noqa: F811
    out, _ = run("push", "runs/tiny", NAME, "--dry-run")
    assert "Eso-LM (B)" in out and "model.safetensors" in out and not server.asked


def test_a_bad_name_is_told_before_anything_is_sent(server, step, run):  # noqa: F811
    _, err = run("push", "runs/tiny", "no-owner", code=2)
    assert "'no-owner' is no name of a repository: give owner/name" in err and not server.asked


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        (EsoLM(variant="A", alpha_0=0.5), ("**Eso-LM (A)**", "2506.01928", "esolm infill")),
        (MDLM(), ("**MDLM**", "2406.07524")),
        (BD3LM(block_size=4), ("**BD3-LM** with blocks of 4", "2503.09573")),
        (AR(), ("**An autoregressive model**",)),
    ],
)
def test_the_card_of_every_method_says_what_it_is(algorithm, words):
    model = Model(Denoiser(NETWORK), algorithm, Tokenizer.bytes(), facts={"step": 3})
    told = card(model, NAME)
    assert told.startswith("---\nlibrary_name: esolm\n") and "# tiny" in told and "license" not in told
    for word in words:
        assert word in told
    assert ("esolm infill" in told) is not isinstance(algorithm, AR)


@pytest.mark.parametrize(("algorithm", "words"), [(MDLM(), "at most 1.250 nats"), (AR(), "| 1.250 nats")])
def test_a_bound_on_a_card_is_called_one(algorithm, words):
    facts = {"step": 3, "validation": 1.25, "bits_per_byte": 1.8034}
    told = card(Model(Denoiser(NETWORK), algorithm, Tokenizer.bytes(), facts=facts), NAME)
    assert f"{words} a token, 1.803 bits a byte |" in told
    del facts["bits_per_byte"]  # of a run by an earlier version
    told = card(Model(Denoiser(NETWORK), algorithm, Tokenizer.bytes(), facts=facts), NAME)
    assert f"{words} a token |" in told


def test_without_the_library_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(hub.HubError, match=r"there is no folder someone/tiny here.*pip install 'esolm\[hub\]'"):
        hub.located(NAME)


def test_what_the_authors_published_is_imported_by_name(server, tmp_path, run):  # noqa: F811
    from test_importing import BD3, assert_same, published, theirs

    weights = theirs(True)
    folder = published(tmp_path / "here", BD3, weights, shards=3)
    server.commit("theirs/bd3lm", files_of(folder) | {"modeling.py": b"raise SystemExit"})
    out, _ = run("import", "theirs/bd3lm", "--out", tmp_path / "run")
    assert "BD3LM(block_size=5)" in out
    assert_same(tmp_path / "run", weights, True)
    assert not [path for path in server.paths("GET") if path.endswith(".py")]
