"""Named data sets: the `datasets` library itself on a small set in a folder, since no hub is reached from a test."""

import json

import pytest

from esolm.corpus import DataError, documents, pairs

datasets = pytest.importorskip("datasets", reason="THE DATASETS LIBRARY IS NOT INSTALLED: pip install 'esolm[data]'")
DOCUMENTS = ["First document.\nTwo lines.", "Zweites Dokument: ä"]


def lines_of(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """A data set of two splits in a folder, which the library reads as it reads one of a hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "stories"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(lines_of(*({"text": text, "id": 1} for text in [*DOCUMENTS, None])))
    (folder / "test.jsonl").write_bytes(lines_of({"text": "held out", "id": 2}))
    return folder


def test_a_data_set_is_streamed_by_name_configuration_and_split(data_set):
    assert list(documents(f"hf:{data_set}")) == DOCUMENTS
    assert list(documents(f"hf:{data_set}:default:test")) == ["held out"]
    assert list(documents(f"hf:{data_set}::test")) == ["held out"]
    assert list(pairs(f"hf:{data_set}::test", prompt="text", answer="text")) == [("held out", "held out")]


def test_a_folder_of_a_data_set_may_have_a_colon_in_its_name(data_set):
    renamed = data_set.rename(data_set.with_name("stories:2"))
    assert list(documents(f"hf:{renamed}")) == DOCUMENTS


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("::tset", "cannot load the data set .*stories::tset: .*test"),
        (":other", "cannot load the data set .*stories:other: .*default"),
        ("/absent", "cannot load the data set .*absent"),
    ],
)
def test_a_data_set_that_is_not_there_is_named(data_set, ending, words):
    with pytest.raises(DataError, match=words):
        list(documents(f"hf:{data_set}{ending}"))


def test_a_data_set_without_the_field_is_named_with_the_nearest(data_set):
    with pytest.raises(DataError, match=r"record 1 of .*stories has no field 'txt'; did you mean 'text'"):
        list(documents(f"hf:{data_set}", field="txt"))


def test_a_data_set_that_is_broken_is_named(data_set):
    (data_set / "train.jsonl").write_bytes(lines_of({"text": "a"}) + b'{"text": "b')
    with pytest.raises(DataError, match=r"cannot load the data set .*stories"):
        list(documents(f"hf:{data_set}"))
