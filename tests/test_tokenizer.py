"""Tokenizers: exact round trips, special ids that text never yields, and files that are none."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from esolm import tokenizer as module
from esolm.tokenizer import END, MASK, Tokenizer

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 20
LEARNED = Tokenizer.train([TEXT], 300)
BYTES = Tokenizer.bytes()


# A BPE that has learned runs of white space, which the cutting of texts must neither make nor break.
SPACED = Tokenizer.train(["\n\n x\r\n y\n\n\n\n z\t\t\t u\n \n v" * 50], 270)


@pytest.mark.parametrize("tokenizer", [BYTES, LEARNED], ids=["bytes", "bpe"])
@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_every_text_comes_back_as_it_was(tokenizer, text):
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.num_bytes(ids) == len(text.encode())


@pytest.mark.parametrize("tokenizer", [BYTES, LEARNED], ids=["bytes", "bpe"])
def test_the_mask_is_the_last_id_and_no_text_yields_a_special_one(tokenizer):
    assert tokenizer.mask_id == tokenizer.vocab_size - 1
    spelled = f"a{MASK}b{END}c"
    assert not {tokenizer.mask_id, tokenizer.end_id} & set(tokenizer.encode(spelled))
    assert tokenizer.decode(tokenizer.encode(spelled)) == spelled


def test_bytes_are_their_own_ids():
    assert BYTES.encode("é\n") == [0xC3, 0xA9, 10]
    assert (BYTES.end_id, BYTES.mask_id) == (256, 257)


def test_masks_are_shown_and_end_of_text_is_left_out():
    ids = [*BYTES.encode("ab"), BYTES.mask_id, BYTES.end_id, *BYTES.encode("c")]
    assert BYTES.decode(ids) == "ab░c"
    assert BYTES.decode(ids, mask="?") == "ab?c"
    assert BYTES.num_bytes(ids) == 3


def test_half_a_character_is_shown_as_such():
    assert BYTES.decode([0xC3]) == "�"


def test_the_same_texts_make_the_same_tokenizer_and_a_file_brings_it_back(tmp_path):
    again = Tokenizer.train([TEXT], 300)
    assert again.digest == LEARNED.digest != BYTES.digest
    LEARNED.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.digest == LEARNED.digest and loaded.vocab_size == 300
        assert loaded.encode(TEXT) == LEARNED.encode(TEXT)


def test_gpt2_files_give_their_ids_and_a_mask_behind(tmp_path):
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    letters |= {"to": 256, END: 257}
    (tmp_path / "encoder.json").write_text(json.dumps(letters))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nt o\n")
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.end_id, tokenizer.mask_id, tokenizer.vocab_size) == (257, 258, 259)
    assert tokenizer.encode("to") == [256]


def test_a_tokenizer_of_others_gets_the_ids_it_lacks_once():
    other = Backend(models.WordLevel({"hello": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    tokenizer = Tokenizer.from_json(other.to_str())
    assert (tokenizer.end_id, tokenizer.mask_id, tokenizer.vocab_size) == (2, 3, 4)
    assert Tokenizer.from_json(tokenizer.to_json()).vocab_size == 4


def test_a_model_with_a_piece_spelled_like_a_special_token_yields_none_from_text():
    """T5's model has "</s>" as a piece like any other: a text that spells it used to end there."""
    pieces = ["<unk>", "</s>", *"<>/sab"]
    other = Backend(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer = Tokenizer.from_json(other.to_str())
    assert tokenizer.end_id == 1
    spelled = [pieces.index(letter) for letter in "a</s>b</s>"]
    assert tokenizer.encode("a</s>b</s>") == spelled
    assert tokenizer.encode_batch(["ab", "a</s>b</s>"]) == [tokenizer.encode("ab"), spelled]


def test_a_tokenizer_whose_unknown_piece_is_end_of_text_is_told_of():
    other = Backend(models.WordLevel({"a": 0, "</s>": 1}, unk_token="</s>"))
    with pytest.raises(ValueError, match="turns unknown pieces into end-of-text"):
        Tokenizer.from_json(other.to_str()).encode("b")


def test_a_special_token_that_a_file_does_not_mark_as_one_still_comes_from_no_text():
    other = Backend(BYTES._backend.model)
    other.pre_tokenizer, other.decoder = BYTES._backend.pre_tokenizer, BYTES._backend.decoder
    other.add_tokens([AddedToken("</s>", special=False)])
    tokenizer = Tokenizer.from_json(other.to_str())
    assert tokenizer.end_id == 256 and tokenizer.encode("a</s>") == list(b"a</s>")


@given(texts=st.lists(st.text()))
@settings(max_examples=50, deadline=None)
def test_many_texts_at_once_are_each_text_alone(texts):
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    assert LEARNED.encode_batch(texts) == [LEARNED.encode(text) for text in texts]


@pytest.mark.parametrize("encode", [BYTES.encode, lambda text: BYTES.encode_batch(["fine", text])])
def test_half_a_surrogate_pair_is_no_text(encode):
    with pytest.raises(ValueError, match=r"character 2 is half a surrogate pair \(U\+D83D\)"):
        encode("ab\ud83d")


@given(text=st.text(alphabet="ab1.,é \n\t\r'", max_size=400))
@settings(max_examples=100, deadline=None)
def test_a_huge_text_is_encoded_in_pieces_and_no_id_changes(text):
    """A cut behind "\\n\\n" used to give the one token of two line breaks, where the whole text has two tokens."""
    whole = SPACED.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", 5)
        patch.setattr(module, "_TOGETHER", 3)
        (found,) = SPACED.encode_arrays([text], "uint16")
    assert found.tolist() == whole


def test_pieces_are_many_and_only_behind_lone_line_breaks(monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 4)
    assert list(module._pieces("one\ntwo\n\nthree\n four five\nsix\n")) == ["one\ntwo\n\nthree\n four five\n", "six\n"]


def test_texts_come_back_as_arrays_each_its_own():
    found = list(LEARNED.encode_arrays(["to be", "", "not"], "uint16"))
    assert [ids.tolist() for ids in found] == [LEARNED.encode("to be"), [], LEARNED.encode("not")]
    assert {ids.dtype.name for ids in found} == {"uint16"}


@pytest.mark.parametrize(
    "before", [None, pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel(add_prefix_space=True)], ids=str
)
def test_texts_of_tokenizers_that_join_or_prefix_lines_are_not_cut(monkeypatch, before):
    other = Backend(models.BPE(vocab={letter: n for n, letter in enumerate("ab\nĊĠ▁")}, merges=[]))
    if before is not None:
        other.pre_tokenizer = before
    tokenizer = Tokenizer.from_json(other.to_str())
    monkeypatch.setattr(module, "_PIECE", 2)
    (found,) = tokenizer.encode_arrays(["ab\nab\nab"], "uint16")
    assert found.tolist() == tokenizer.encode("ab\nab\nab")


def test_gpt2_files_that_are_damaged_are_named(tmp_path):
    (tmp_path / "encoder.json").write_text('{"a": 0}')
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nx y\n")
    with pytest.raises(ValueError, match=r"cannot read the tokenizer .*encoder\.json with vocab\.bpe"):
        Tokenizer.load(tmp_path)


def test_a_mask_in_the_middle_is_refused():
    other = Backend(models.WordLevel({"a": 0, MASK: 1, "b": 2, END: 3}, unk_token="a"))
    with pytest.raises(ValueError, match="the mask must be the last id"):
        Tokenizer.from_json(other.to_str())


@pytest.mark.parametrize("token", [-1, 258, 10**6])
def test_an_id_out_of_range_is_named(token):
    with pytest.raises(ValueError, match=rf"id {token} is not in the vocabulary: ids lie in \[0, 258\)"):
        BYTES.decode([token])


def test_too_small_a_vocabulary_and_too_little_text_are_said():
    with pytest.raises(ValueError, match="at least 258"):
        Tokenizer.train([TEXT], 100)
    with pytest.raises(ValueError, match="choose vocab_size"):
        Tokenizer.train(["aa"], 1000)


def test_files_that_are_no_tokenizer_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "absent.json")
    with pytest.raises(ValueError, match=r"needs tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"half": ')
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path)
