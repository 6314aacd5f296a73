"""Sealed folders: whatever is missing, damaged, added or forged is found, and the message names the file."""

import hashlib
import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from esolm import seal
from esolm.seal import SealError

NEEDED = ("a.safetensors", "b.json")
ALLOWED = re.compile(r"a\.safetensors|b\.json|inner/c\.txt")


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "sealed"
    (folder / "inner").mkdir(parents=True)
    save_file({"x": torch.arange(3.0), "y": torch.ones(2, dtype=torch.int8)}, folder / "a.safetensors")
    (folder / "b.json").write_text("{}\n")
    (folder / "inner" / "c.txt").write_text("c")
    seal.seal(folder, ["a.safetensors", "b.json", "inner/c.txt"], step=7)
    return folder


def check(folder: Path, *, digests: bool = True) -> dict:
    return seal.check(folder, needed=NEEDED, allowed=ALLOWED, digests=digests)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def forge(folder: Path, **changes: object) -> None:
    """Another manifest, with a digest of its own that is right: damage cannot do this, an author can."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    del manifest["sha256"]
    body = json.dumps(manifest, indent=2).removesuffix("\n}") + ",\n"
    digest = hashlib.sha256(body.encode()).hexdigest()
    (folder / "manifest.json").write_text(f'{body}  "sha256": "{digest}"\n}}\n')


def test_a_sealed_folder_passes_and_gives_its_manifest(folder):
    manifest = check(folder)
    assert manifest["step"] == 7 and list(manifest["files"]) == ["a.safetensors", "b.json", "inner/c.txt"]
    assert manifest["files"]["inner/c.txt"] == {"size": 1, "sha256": hashlib.sha256(b"c").hexdigest()}


def test_where_there_is_no_room_for_a_thread_a_folder_is_sealed_and_checked_without(folder, monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    before = (folder / "manifest.json").read_bytes()
    seal.seal(folder, ["a.safetensors", "b.json", "inner/c.txt"], step=7)
    assert (folder / "manifest.json").read_bytes() == before and check(folder)["step"] == 7
    (folder / "b.json").write_text("[]\n")
    with pytest.raises(SealError, match=r"b\.json"):
        check(folder)


def test_the_last_line_of_a_manifest_is_the_digest_of_the_lines_before(folder):
    lines = (folder / "manifest.json").read_bytes().splitlines(keepends=True)
    assert lines[-2:] == [f'  "sha256": "{hashlib.sha256(b"".join(lines[:-2])).hexdigest()}"\n'.encode(), b"}\n"]


def test_one_flipped_bit_anywhere_is_found_and_its_file_named(folder):
    for path in files_of(folder):
        content = path.read_bytes()
        for at in range(len(content)):
            damaged = bytearray(content)
            damaged[at] ^= 1 << at % 8
            path.write_bytes(damaged)
            with pytest.raises(SealError, match=re.escape(str(path))):
                check(folder)
        path.write_bytes(content)
    check(folder)


def test_a_file_of_any_other_length_is_found_and_named(folder):
    for path in files_of(folder):
        content = path.read_bytes()
        for other in [content[:length] for length in range(len(content))] + [content + b"\n"]:
            path.write_bytes(other)
            with pytest.raises(SealError, match=re.escape(str(path))):
                check(folder, digests=False)
        path.write_bytes(content)
    check(folder)


@pytest.mark.parametrize("name", ["a.safetensors", "b.json", "inner/c.txt", "manifest.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(SealError, match=rf"{re.escape(str(folder / name))} is missing"):
        check(folder)


@pytest.mark.parametrize("name", ["more.txt", ".hidden", "inner/more.txt", "empty/", "other/x.txt"])
def test_what_the_manifest_does_not_list_is_named(folder, name):
    path = folder / name
    (path if name.endswith("/") else path.parent).mkdir(exist_ok=True)
    if not name.endswith("/"):
        path.write_text("x")
    with pytest.raises(
        SealError, match=rf"sealed/{name.partition('/')[0]}.* is not in the manifest; move it elsewhere"
    ):
        check(folder)


@pytest.mark.parametrize("name", ["a.safetensors", "manifest.json", "inner/c.txt"])
def test_a_link_in_the_place_of_a_file_is_refused(folder, tmp_path, name):
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SealError, match=rf"{name} is not a plain file; a link must be replaced"):
        check(folder)


def test_a_link_in_the_place_of_an_inner_folder_is_not_followed(folder, tmp_path):
    shutil.move(folder / "inner", tmp_path / "elsewhere")
    (folder / "inner").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SealError, match="sealed/inner is not in the manifest"):
        check(folder)


def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(folder):
    (folder / "b.json").unlink()
    os.mkfifo(folder / "b.json")
    with pytest.raises(SealError, match=r"b\.json is not a plain file"):
        check(folder)


def test_without_digests_only_the_digests_are_left_out(folder):
    path = folder / "b.json"
    path.write_text("[]\n")
    check(folder, digests=False)
    with pytest.raises(SealError, match=r"b\.json is damaged: expected sha256 \w{64}, found \w{64}"):
        check(folder)


def test_what_is_no_folder_is_named(tmp_path):
    with pytest.raises(SealError, match=r"absent is not a folder with a manifest\.json"):
        check(tmp_path / "absent")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "inner/../b.json", "other.txt", "b.json\n"])
def test_a_name_that_does_not_belong_there_is_refused_before_anything_is_read(folder, name):
    forge(folder, files={name: {"size": 1, "sha256": "0" * 64}})
    with pytest.raises(SealError, match=r"manifest\.json lists .*, a name that does not belong here"):
        check(folder)


def test_a_file_that_must_be_there_must_be_listed(folder):
    forge(folder, files={"b.json": {"size": 3, "sha256": "0" * 64}})
    with pytest.raises(SealError, match=r"manifest\.json lists no a\.safetensors"):
        check(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"size": -1, "sha256": "0" * 64},
        {"size": 1.5, "sha256": "0" * 64},
        {"size": 1, "sha256": "0"},
        {"size": 1},
        None,
    ],
)
def test_an_entry_without_a_size_and_a_digest_is_refused(folder, entry):
    forge(folder, files={"b.json": entry})
    with pytest.raises(SealError, match=r"b\.json needs a size and a sha256"):
        check(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "format 2, this version reads format 1; upgrade esolm"),
        ({"format": "x"}, "format 'x'.*; it was not written by esolm"),
        ({"format": True}, "format True.*; it was not written by esolm"),
        ({"step": -1}, "is not a manifest"),
        ({"step": True}, "is not a manifest"),
        ({"files": []}, "is not a manifest"),
    ],
)
def test_another_format_and_what_is_no_manifest_are_told(folder, changes, words):
    forge(folder, **changes)
    with pytest.raises(SealError, match=words):
        check(folder)


def test_a_huge_manifest_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(seal, "_MANIFEST_LIMIT", 100)
    with pytest.raises(SealError, match=r"manifest\.json has more than 100 bytes"):
        check(folder)


def test_text_that_is_not_utf_8_or_too_long_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(SealError, match=r"a\.txt is damaged: not UTF-8 at byte 2"):
        seal.text(tmp_path / "a.txt", limit=3)
    with pytest.raises(SealError, match=r"a\.txt has more than 2 bytes"):
        seal.text(tmp_path / "a.txt", limit=2)


# -- headers of tensor files, forged and sealed anew -------------------------------------------------------


def reseal(folder: Path, header: bytes, data: bytes, *, length: int | None = None) -> None:
    size = len(header) if length is None else length
    (folder / "a.safetensors").write_bytes(size.to_bytes(8, "little") + header + data)
    seal.seal(folder, ["a.safetensors", "b.json", "inner/c.txt"], step=7)


def tensor(dtype: str = "F32", shape: object = (1,), begin: int = 0, end: int = 4) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("tensors", "size"),
    [
        ({"x": tensor(), "y": tensor(begin=4, end=8)}, 8),
        ({"x": tensor(dtype="BF16", shape=[2]), "__metadata__": {"format": "pt"}}, 4),
        ({"x": tensor(shape=[], end=4)}, 4),
        ({"x": tensor(shape=[0, 3], end=0)}, 0),
    ],
)
def test_a_sound_header_passes(folder, tensors, size):
    reseal(folder, json.dumps(tensors).encode(), bytes(size))
    check(folder)


@pytest.mark.parametrize(
    ("tensors", "size"),
    [
        ({"x": tensor(), "y": tensor(begin=8, end=12)}, 12),  # a gap
        ({"x": tensor(shape=[2], end=8), "y": tensor(begin=4, end=8)}, 8),  # an overlap
        ({"x": tensor()}, 8),  # bytes that no tensor owns
        ({"x": tensor(shape=[2], end=8)}, 4),  # more than there is
        ({"x": tensor(shape=[2])}, 4),
        ({"x": tensor(dtype="F99")}, 4),
        ({"x": tensor(shape=[-1, -1])}, 4),
        ({"x": tensor(shape=[True])}, 4),
        ({"x": tensor(shape=[2**40, 0], end=0)}, 0),
        ({"x": tensor(shape=[1] * 17)}, 4),
        ({"x": tensor(begin=-4, end=0)}, 0),
        ({"x": 3}, 0),
        ([], 0),
    ],
)
def test_tensors_that_do_not_fill_their_file_one_after_another_are_refused(folder, tensors, size):
    reseal(folder, json.dumps(tensors).encode(), bytes(size))
    with pytest.raises(SealError, match=r"a\.safetensors has a bad header"):
        check(folder)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b'{"x": 1, "x": 2}', "repeated|twice"),
        (b"{" + b'"a":{' * 9 + b"}" * 10, "nested more than 4 levels"),
        (b'{"x": ', "not JSON"),
        (b"\xff{}", "utf-8"),
    ],
)
def test_a_header_that_is_no_plain_object_is_refused(folder, header, words):
    reseal(folder, header, b"")
    with pytest.raises(SealError, match=rf"a\.safetensors has a bad header: .*({words})"):
        check(folder)


@pytest.mark.parametrize("length", [3, 2**31, 2**63])
def test_a_header_that_claims_more_than_the_file_has_is_refused(folder, length):
    reseal(folder, b"{}", b"", length=length)
    with pytest.raises(SealError, match=rf"a\.safetensors claims a header of {length} bytes"):
        check(folder)


def test_a_header_too_large_to_be_parsed_in_a_moment_is_refused(folder, monkeypatch):
    monkeypatch.setattr(seal, "_HEADER_LIMIT", 20)
    with pytest.raises(SealError, match=r"a\.safetensors claims a header of \d+ bytes; at most 20 are read"):
        check(folder)


def test_files_are_on_disk_before_the_manifest_that_vouches_for_them(folder, monkeypatch):
    synced: list[str] = []
    monkeypatch.setattr(seal, "sync", lambda path: synced.append(str(path.relative_to(folder))))
    seal.seal(folder, ["a.safetensors", "b.json", "inner/c.txt"], step=7)
    assert synced[:3] == ["a.safetensors", "b.json", "inner/c.txt"] and synced[3:] == ["inner", "manifest.json", "."]
