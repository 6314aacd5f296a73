"""Two machines in small: two network namespaces, joined by a link that holds every packet back, and that may break.

The link is made here, of two TUN devices, since not every kernel has tc's netem. It needs root and Linux.
"""

import fcntl
import itertools
import os
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import pytest
import torch

from esolm import checkpoint, journal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = ("network.width=32", "network.layers=2", "network.heads=2", "network.length=32", "batch_size=8")
MORE = ("dtype=float32", "sample_every=null", "save_every=10", "log_every=1", "num_steps=30")


class Link:
    """Namespaces esolm0 and esolm1 with addresses 10.77.0.1 and 10.77.0.2; a context manager."""

    def __init__(self, delay: float) -> None:
        self._delay, self._ends, self._over, self.broken = delay, [], False, False

    def __enter__(self) -> "Link":
        for side in (0, 1):
            device, name = f"esolm{side}", f"esolm{side}"
            end = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(end, 0x400454CA, struct.pack("16sH", device.encode(), 0x1001))  # TUNSETIFF: TUN, no header
            self._ends.append(end)
            for command in (
                f"ip netns add {name}",
                f"ip link set {device} netns {name}",
                f"ip -n {name} addr add 10.77.0.{side + 1}/24 dev {device}",
                f"ip -n {name} link set {device} up",
                f"ip -n {name} link set lo up",
            ):
                subprocess.run(command.split(), check=True)
        self._thread = threading.Thread(target=self._carry)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join()
        for side in (0, 1):
            os.close(self._ends[side])
            subprocess.run(["ip", "netns", "del", f"esolm{side}"], check=True)

    def _carry(self) -> None:
        waiting: deque[tuple[float, int, bytes]] = deque()
        while not self._over:
            until = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.05
            for end in select.select(self._ends, [], [], until)[0]:
                waiting.append(
                    (time.monotonic() + self._delay, self._ends[1 - self._ends.index(end)], os.read(end, 65536))
                )
            while waiting and waiting[0][0] <= time.monotonic():
                _, end, packet = waiting.popleft()
                if not self.broken:
                    os.write(end, packet)


@pytest.fixture(autouse=True)
def namespaces() -> None:
    if not sys.platform.startswith("linux") or not shutil.which("ip"):
        pytest.skip("separate networks need Linux and iproute2 (apt-get install iproute2): NOT TESTED here")
    made = subprocess.run(["ip", "netns", "add", "esolmtry"], capture_output=True, text=True)
    if made.returncode or not os.access("/dev/net/tun", os.W_OK):
        pytest.skip(
            f"separate networks need root, network namespaces and /dev/net/tun: NOT TESTED here ({made.stderr})"
        )
    subprocess.run(["ip", "netns", "del", "esolmtry"], check=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\f".join("the quick brown fox jumps over the lazy dog; " * 40 for _ in range(60)))
    return path


def train(text: Path, out: Path, side: int | None, *more: str) -> subprocess.Popen[bytes]:
    """`torchrun ... esolm train` on one of two machines of one rank each, or (None) on both ranks of this one."""
    here = ["--nproc-per-node", "2", "--master-port", "29655"]
    there = [
        *("--nnodes", "2", "--node-rank", str(side), "--nproc-per-node", "1"),
        *("--master-addr", "10.77.0.1", "--master-port", "29655"),
    ]
    options = ["--out", str(out), "--recipe", "demo", "--data", str(text), "--vocab-size", "258"]
    return subprocess.Popen(
        [
            *([] if side is None else ["ip", "netns", "exec", f"esolm{side}"]),
            *(sys.executable, "-m", "torch.distributed.run", *(here if side is None else there)),
            *("-m", "esolm", "train", *options, "--set", *SETTINGS, *MORE, *more),
        ],
        stderr=out.with_suffix(f".{side}.err").open("w"),
        env={**os.environ, "OMP_NUM_THREADS": "1"} | ({} if side is None else {"GLOO_SOCKET_IFNAME": f"esolm{side}"}),
    )


def seconds_a_step(out: Path) -> float:
    times = [entry["time"] for entry in journal.read(out) if "loss" in entry]
    return sorted(later - former for former, later in itertools.pairwise(times))[len(times) // 2]


@pytest.mark.parametrize("shard", ["false", "true"], ids=["replicated", "shards"])
def test_two_machines_far_apart_train_the_network_of_one(tmp_path, text, shard):
    alone = train(text, tmp_path / "near", None, f"shard={shard}")
    assert alone.wait(timeout=300) == 0
    with Link(delay=0.010):
        apart = [train(text, tmp_path / "apart", side, f"shard={shard}") for side in (0, 1)]
        codes = [process.wait(timeout=600) for process in apart]
    assert codes == [0, 0], (tmp_path / "apart.0.err").read_text()
    ours, theirs = (checkpoint.load(tmp_path / name) for name in ("near", "apart"))
    assert ours.step == theirs.step == 30
    assert all(torch.equal(tensor, theirs.model[name]) for name, tensor in ours.model.items())
    near, far = (1000 * seconds_a_step(tmp_path / name) for name in ("near", "apart"))
    print(
        f"shard={shard}: the same bits; {near:.0f} ms a step on one machine, {far:.0f} ms with 10 ms in each direction"
    )


def test_a_link_that_breaks_is_noticed_on_both_sides_within_thirty_seconds(tmp_path, text):
    with Link(delay=0.001) as link:
        apart = [train(text, tmp_path / "cut", side, "num_steps=100000") for side in (0, 1)]
        log = tmp_path / "cut" / journal.FILE
        began = time.monotonic()
        while not log.exists() or not any("loss" in entry for entry in journal.read(tmp_path / "cut")):
            assert time.monotonic() - began < 200
            time.sleep(0.1)
        link.broken = True
        at = time.monotonic()
        told = [tmp_path / f"cut.{side}.err" for side in (0, 1)]
        while not all("stops:" in path.read_text() for path in told):
            assert time.monotonic() - at < 45, [path.read_text() for path in told]
            time.sleep(0.1)
        print(f"a broken link: noticed by both in {time.monotonic() - at:.1f} s")
        for process in apart:
            process.terminate()
        assert all(process.wait(timeout=120) for process in apart)
