"""A corpus of 10^11 tokens costs what one of 10^6 does: opened, split and drawn from, in a process of its own."""

import json
import subprocess
import sys

import pytest

MEASURE = """if True:
    import json, os, resource, sys, time
    from pathlib import Path
    import numpy as np
    from esolm import data, plain, seal, shards, tokenizing

    def peak():
        return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

    folder, num_documents, size, shard = Path(sys.argv[1]), 10**int(sys.argv[2]), 1000, 2**28
    total = num_documents * size
    folder.mkdir()
    names = []
    for at in range(0, total, shard):
        names.append(f"tokens-{len(names):05d}.bin")
        with (folder / names[-1]).open("wb") as file:
            file.truncate(2 * min(shard, total - at))
    with (folder / "documents.npy").open("wb") as file:  # of the table, what a split may read; the rest is a hole
        file.write(tokenizing._header(num_documents))
        file.truncate(128 + 24 * num_documents)
        runs = min(num_documents, shards._RUNS)
        for row in {*(np.arange(runs) * num_documents // runs).tolist(), num_documents - 1}:
            file.seek(128 + 24 * row)
            file.write(np.array([row * size, row * size, row * size + size]).tobytes())
    index = {"dtype": "uint16", "end_id": 256, "vocab_size": 258, "tokenizer_digest": "", "paired": False}
    (folder / "index.json").write_text(plain.render(index))
    names += ["documents.npy", "index.json"]
    seal.seal(folder, names, step=0, known=dict.fromkeys(names, "0" * 64))  # nobody reads 200 GB of holes
    data.Loader(shards.TokenData.open(folder), length=8).batch(0, 0, 1, 1)  # what is loaded at a first call
    before, began = peak(), time.monotonic()
    learned, held_out = shards.TokenData.open(folder).split(0.05)
    loader = data.Loader(learned, length=256)
    opened = time.monotonic() - began
    for step in range(1000):
        loader.batch(step, 0, 16, 16)
    told = [learned.num_tokens, held_out.num_tokens, opened, time.monotonic() - began, peak() - before]
    print(json.dumps(told))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_a_thousand_batches_of_a_hundred_billion_tokens_cost_a_second_and_little_memory(tmp_path):
    found = {}
    for power in (3, 8):  # documents of 1,000 tokens
        command = [sys.executable, "-c", MEASURE, str(tmp_path / str(power)), str(power)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        learned, held_out, opened, seconds, memory = json.loads(done.stdout)
        print(
            f"10^{power + 3} tokens: opened {opened:.3f} s, with 1,000 batches {seconds:.2f} s, {memory / 1e6:.0f} MB"
        )
        assert learned + held_out == 10 ** (power + 3) and 0.04 < held_out / (learned + held_out) < 0.06
        found[power] = seconds
        assert seconds < 10 and memory < 200e6  # measured: docs/log.md; a slow machine has slack
