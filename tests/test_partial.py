"""Large files of the Hub go on where another process stopped, and what is bad is never kept."""

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import esolm
from esolm import checkpoint, hub, share
from esolm.checkpoint import CheckpointError
from esolm.denoiser import Config
from test_hub_models import NAME, files_of, library, logits, saved, server  # noqa: F401  (one is a fixture)

WEIGHTS = "model.safetensors"


def packed(tmp_path: Path, seed: int) -> Path:
    """A step as it is pushed: one file of weights."""
    run = saved(tmp_path / "runs" / str(seed), seed=seed)
    return checkpoint.save(tmp_path / "packed" / str(seed), checkpoint.load(run).for_readers())


@pytest.fixture
def step(tmp_path) -> Path:
    return packed(tmp_path, 0)


@pytest.fixture
def held(server, step, tmp_path, monkeypatch):  # noqa: F811
    """A repository of large files, as a library with a small chunk sees them; gives the file that an earlier process
    left, which is not there yet."""
    monkeypatch.setattr(library.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.commit(NAME, files_of(step))
    return held_of(tmp_path / "home" / "hub", files_of(step)[WEIGHTS])


def held_of(cache: Path, content: bytes, repository: str = "someone--tiny") -> Path:
    blobs = cache / f"models--{repository}" / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    return blobs / f"{hashlib.sha256(content).hexdigest()}.esolm.incomplete"


def ranges(server) -> list[str | None]:  # noqa: F811
    """What was asked for of the weights, one for each request."""
    return [h.get("range") for verb, path, h in server.asked if verb == "GET" and path.endswith(f"/{WEIGHTS}")]


def assert_fetched(step: Path, held: Path) -> None:
    assert logits(esolm.load(NAME, dtype="float32")).equal(logits(esolm.load(step, dtype="float32")))
    assert (held.with_name(held.name.partition(".")[0])).read_bytes() == files_of(step)[WEIGHTS]
    assert not list(held.parent.glob("*.incomplete"))


def test_what_is_there_is_not_asked_for_again(server, step, held):  # noqa: F811
    held.write_bytes(files_of(step)[WEIGHTS][:5000])
    assert_fetched(step, held)
    assert ranges(server) == ["bytes=5000-"]


def test_a_file_that_had_all_but_its_name_is_not_asked_for(server, step, held):  # noqa: F811
    held.write_bytes(files_of(step)[WEIGHTS])
    assert_fetched(step, held)
    assert ranges(server) == []


def test_a_connection_that_breaks_in_the_rest_goes_on_too(server, step, held):  # noqa: F811
    held.write_bytes(files_of(step)[WEIGHTS][:5000])
    server.breaks_off_after = 3000
    assert_fetched(step, held)
    first, second = ranges(server)
    assert first == "bytes=5000-" and 5000 < int(re.findall(r"\d+", second)[0]) <= 8000


@pytest.mark.parametrize("kept", [5000, None], ids=["a part", "as much as the file has"])
def test_what_is_bad_in_a_part_is_fetched_anew(server, step, held, kept):  # noqa: F811
    content = bytearray(files_of(step)[WEIGHTS][:kept])
    content[1234] ^= 1
    held.write_bytes(content)
    assert_fetched(step, held)
    assert ranges(server)[-1] is None


def test_a_part_longer_than_the_file_is_fetched_anew(server, step, held):  # noqa: F811
    held.write_bytes(files_of(step)[WEIGHTS] + b"more")
    assert_fetched(step, held)
    assert ranges(server) == [None]


def test_a_server_that_ignores_ranges_gives_the_same_file(server, step, held):  # noqa: F811
    held.write_bytes(files_of(step)[WEIGHTS][:5000])
    server.ignores_ranges = True
    assert_fetched(step, held)
    assert ranges(server) == ["bytes=5000-"]


def test_a_file_that_changed_on_the_hub_is_another_file(server, step, held, tmp_path):  # noqa: F811
    held.write_bytes(files_of(step)[WEIGHTS][:5000])
    other = packed(tmp_path, 1)
    server.commit(NAME, files_of(other))
    assert logits(esolm.load(NAME, dtype="float32")).equal(logits(esolm.load(other, dtype="float32")))
    assert None in ranges(server) and held.stat().st_size == 5000


def test_what_is_spoilt_on_its_way_is_fetched_once_more_and_then_refused(server, step, held, tmp_path):  # noqa: F811
    server.spoils = 1
    assert_fetched(step, held)
    server.commit(NAME, files_of(packed(tmp_path, 1)))
    server.spoils = 2
    with pytest.raises(CheckpointError, match=rf"{NAME}.*{WEIGHTS} arrived twice with another sha256 than the Hub"):
        esolm.load(NAME)
    assert len(list(held.parent.glob("*.incomplete"))) == 0


def test_a_hub_that_does_not_answer_leaves_what_the_cache_has(server, step, held, monkeypatch):  # noqa: F811
    """As after `hf download owner/name`: all is in the cache, nothing in our folder."""
    library.snapshot_download(NAME)
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", True)
    assert_fetched(step, held)


def test_what_the_authors_published_goes_on_too(server, held):  # noqa: F811
    content = os.urandom(20_000)
    server.commit("theirs/mdlm", {"config.json": b"{}", WEIGHTS: content})
    held_of(held.parents[2], content, "theirs--mdlm").write_bytes(content[:7000])
    assert (hub.published("theirs/mdlm") / WEIGHTS).read_bytes() == content
    assert ranges(server) == ["bytes=7000-"]


@pytest.mark.parametrize("locks_hold", [True, False])
def test_two_at_once_spoil_nothing(server, step, held, monkeypatch, locks_hold):  # noqa: F811
    """Where locks hold one fetches and the other waits. On some file systems all are granted: there both fetch."""
    if not locks_hold:
        monkeypatch.setattr(library.utils, "WeakFileLock", lambda _: contextlib.nullcontext())
    held.write_bytes(files_of(step)[WEIGHTS][:5000])
    server.slow = 1.0
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(hub.located(NAME))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and ranges(server) == ["bytes=5000-"] * (1 if locks_hold else 2)
    assert_fetched(step, held)


def test_a_process_that_was_killed_in_a_file_leaves_the_next_one_the_rest(server, tmp_path):  # noqa: F811
    """As it is: `kill -9` in the midst of 25 MB, the library's own chunks of 10."""
    network = Config(vocab_size=258, length=16, width=512, layers=2, heads=8)
    big = share.pack(saved(tmp_path / "big", network=network), tmp_path / "packed", NAME)
    server.commit(NAME, files_of(big))
    size, chunk = len(files_of(big)[WEIGHTS]), library.constants.DOWNLOAD_CHUNK_SIZE
    server.stalls_after = 2 * chunk + 1000
    settings = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "new"), "HF_HUB_DISABLE_XET": "1"}
    command, env = [sys.executable, "-m", "esolm", "info", NAME], {**os.environ, **settings}
    held = held_of(tmp_path / "new" / "hub", files_of(big)[WEIGHTS])
    killed = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert server.stalled.wait(120)
        deadline = time.monotonic() + 60
        while (not held.exists() or held.stat().st_size < 2 * chunk) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        server.released.set()
    assert held.stat().st_size == 2 * chunk
    served = server.served
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "alpha_0" in done.stdout, done.stderr
    assert ranges(server) == [None, f"bytes={2 * chunk}-"]
    assert size - 2 * chunk <= server.served - served < size - 2 * chunk + 100_000  # the rest, and small files
    assert not held.exists() and (tmp_path / "new" / "esolm").is_dir()
