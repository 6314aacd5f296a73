"""From the name of a text to batches: what is found is used again, and what does not fit together is told."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer as Backend

from esolm import checkpoint, prepare
from esolm.algorithms import EsoLM
from esolm.checkpoint import CheckpointError
from esolm.corpus import DataError, shipped
from esolm.denoiser import Config
from esolm.plain import to_plain
from esolm.prepare import Source, like, located, resumed, tokenizer_of, tokens
from esolm.shards import TokenData
from esolm.tokenizer import Tokenizer
from esolm.train import Run, description

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\f".join(f"{number}. {TEXT}" for number in range(20)))
    return path


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "qa.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "question": f"{n} plus {n}?", "answer": str(2 * n)} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def texts_of(tokenizer: Tokenizer, data: TokenData) -> list[str]:
    return [tokenizer.decode(data.document(number).tolist()) for number in range(data.num_documents)]


# -- sources -----------------------------------------------------------------------------------------------


def test_documents_are_texts_and_those_of_pairs_are_prompts_and_answers(text, questions):
    assert list(Source(data=str(text)).documents())[3] == f"3. {TEXT}".strip()
    assert list(Source(data=str(questions), pairs=True).documents())[2:4] == ["1+1=", "2"]


def test_fields_are_named_by_the_user_or_text_prompt_and_answer(questions):
    assert next(Source(data=str(questions), field="question").documents()) == "0 plus 0?"
    pairs = Source(data=str(questions), pairs=True, field="answer", answer="question").question_and_answer()
    assert next(pairs) == ("0", "0 plus 0?")
    with pytest.raises(DataError, match="no field 'text'"):
        next(Source(data=str(questions)).documents())


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_to_hold_out_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\)"):
        Source(data="x", validation=share)


def test_a_name_that_no_checkpoint_could_hold_is_refused_at_once():
    with pytest.raises(ValueError, match=r"the name 'caf\\udce9.txt' is not UTF-8.*: rename it"):
        Source(data="caf\udce9.txt")


def test_shakespeare_is_the_shipped_text_unless_a_file_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert located("shakespeare") == shipped()
    Path("shakespeare").write_text("my own")
    assert located("shakespeare") == "shakespeare"
    assert list(Source(data="shakespeare").documents()) == ["my own"]


# -- tokens ------------------------------------------------------------------------------------------------


def test_a_vocabulary_is_learned_from_the_text_and_kept(text, tmp_path):
    tokenizer, data = tokens(Source(data=str(text)), tmp_path / "run", vocab_size=280)
    assert tokenizer.vocab_size == data.vocab_size == 280
    assert Tokenizer.load(tmp_path / "run").digest == tokenizer.digest == data.tokenizer_digest
    assert texts_of(tokenizer, data) == list(Source(data=str(text)).documents())


def test_a_vocabulary_of_258_is_bytes_and_reads_nothing_to_learn(text, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "train", staticmethod(lambda *_: pytest.fail("learned")))
    tokenizer, data = tokens(Source(data=str(text)), tmp_path / "run", vocab_size=258)
    assert tokenizer.digest == Tokenizer.bytes().digest
    assert bytes(data.document(0)[:-1].tolist()) == f"0. {TEXT}".strip().encode()


def test_too_little_text_for_a_vocabulary_says_which_size_to_choose(text, tmp_path):
    with pytest.raises(
        ValueError, match=r"pairs for (\d+) ids only, not 4096: choose vocab_size \d+ or give more"
    ) as told:
        tokens(Source(data=str(text)), tmp_path / "run")
    size = int(str(told.value).split("vocab_size ")[1].split()[0])
    assert tokens(Source(data=str(text)), tmp_path / "run", vocab_size=size)[0].vocab_size == size


def test_the_tokenizer_in_the_folder_or_the_one_given_is_used(text, tmp_path):
    first, _ = tokens(Source(data=str(text)), tmp_path / "run", vocab_size=280)
    again, _ = tokens(Source(data=str(text)), tmp_path / "run")
    assert again.digest == first.digest
    other, _ = tokens(Source(data=str(text)), tmp_path / "other", tokenizer=first, vocab_size=300)
    assert other.digest == first.digest
    with pytest.raises(DataError, match="another tokenizer"):
        tokens(Source(data=str(text)), tmp_path / "run", tokenizer=Tokenizer.bytes())


def test_a_vocabulary_is_learned_from_the_beginning_of_a_long_text_in_parts(monkeypatch):
    monkeypatch.setattr(prepare, "_PART", 4)
    assert list(prepare._beginning(iter(["abcdef", "gh", "ijklm", "never"]), 10)) == ["abcd", "ef", "gh", "ij"]
    assert list(prepare._beginning(iter(["ab", "c"]), 10)) == ["ab", "c"]


def test_tokens_that_are_there_are_used_again_even_if_the_text_is_gone(text, tmp_path):
    _, data = tokens(Source(data=str(text)), tmp_path / "run", vocab_size=258)
    text.unlink()
    _, again = tokens(Source(data=str(text)), tmp_path / "run", vocab_size=258)
    assert again.num_tokens == data.num_tokens


@pytest.mark.parametrize("pairs", [False, True])
def test_text_that_has_changed_since_is_refused(text, questions, tmp_path, pairs):
    source = Source(data=str(questions if pairs else text), pairs=pairs)
    tokens(source, tmp_path / "run", vocab_size=258)
    path = Path(source.data)
    path.write_text(path.read_text().replace("1", "7"))
    with pytest.raises(
        DataError, match=r"the text has changed since it was tokenized into .*data: remove it, or choose"
    ):
        tokens(source, tmp_path / "run", vocab_size=258)


def test_the_share_held_out_and_its_seed_need_no_other_tokens(text, tmp_path):
    _, data = tokens(Source(data=str(text)), tmp_path / "run", vocab_size=258)
    same = Source(data=str(text), field="text", answer="unused", validation=0.5, seed=9)
    _, again = tokens(same, tmp_path / "run", vocab_size=258)
    assert again.num_tokens == data.num_tokens
    with pytest.raises(DataError, match="another text"):
        tokens(Source(data=str(text), field="body"), tmp_path / "run", vocab_size=258)


def test_learning_a_vocabulary_and_tokenizing_are_shown_with_the_time_left(text, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    tokens(Source(data=str(text)), tmp_path / "run", vocab_size=280, console=console)
    shown = console.file.getvalue()
    assert "learning a vocabulary of 280 from the text" in shown and "100%, 0:00:00 left" in shown


def test_a_text_is_split_by_document_into_batches_and_windows(text, tmp_path):
    found = prepare.prepare(Source(data=str(text), validation=0.2), tmp_path / "run", vocab_size=258)
    assert found.learned.num_documents + found.held_out.num_documents == 20
    assert found.held_out.num_documents == 4
    batch = found.training(16, seed=3).batch(0, 0, 4, 4)
    assert batch.tokens.shape == (4, 16) and batch.valid.all() and not batch.given.any()
    held_out = torch.cat([windows.tokens[windows.valid] for windows in found.validation(16).windows(4)])
    assert held_out.tolist() == [t for n in range(4) for t in found.held_out.document(n).tolist()]


def test_pairs_become_rows_with_the_prompt_given(questions, tmp_path):
    found = prepare.prepare(Source(data=str(questions), pairs=True), tmp_path / "run", vocab_size=258)
    batch = found.training(12).batch(0, 0, 38, 38)
    assert found.learned.paired and found.learned.num_documents == 38
    for row, given, valid in zip(batch.tokens, batch.given, batch.valid, strict=True):
        scored = row[valid & ~given].tolist()
        prompt, answer = bytes(row[given].tolist()), bytes(scored[: scored.index(256)])
        assert prompt == b"%d+%d=" % (int(answer) // 2, int(answer) // 2)
        assert set(scored[scored.index(256) :]) == {256}


def test_a_shipped_text_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_LEARNED_FROM", 10**5)
    found = prepare.prepare(Source(data="shakespeare"), tmp_path / "run", vocab_size=300)
    assert found.learned.num_documents + found.held_out.num_documents == 42
    beginning = found.tokenizer.decode(found.learned.document(0)[:99].tolist())
    assert [text for text in Source(data="shakespeare").documents() if text.startswith(beginning)]


# -- runs that are there already ---------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> tuple[Path, Run, Source]:
    """A checkpoint of a run that was never trained."""
    source = Source(data="books/", pairs=True, field="q", validation=0.1, seed=4)
    network = Config(vocab_size=258, length=8, width=16, layers=1, heads=2, dropout=0.1)
    run = Run(algorithm=EsoLM(alpha_0=0.25), network=network, num_steps=5, batch_size=4)
    path = checkpoint.save(
        tmp_path / "saved",
        checkpoint.Checkpoint(
            step=5,
            model={"x": torch.ones(1)},
            config=description(run),
            tokenizer_json=Tokenizer.bytes().to_json(),
            state={"origin": source.origin()},
        ),
    )
    return path, run, source


def test_a_run_and_its_source_are_read_from_its_checkpoint(saved):
    path, run, source = saved
    assert resumed(path.parent) == (run, source)


def test_a_source_comes_back_from_what_a_checkpoint_records(saved):
    source = saved[2]
    assert source.origin() == {**to_plain(source)} and source.origin()["validation"] == 0.1


def test_a_run_without_a_source_is_told_to_be_resumed_from_python(saved, tmp_path):
    found = checkpoint.load(saved[0])
    checkpoint.save(tmp_path / "other", replace(found, state={}))
    with pytest.raises(ValueError, match="does not say where its data came from: resume it from Python"):
        resumed(tmp_path / "other")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        resumed(tmp_path / "absent")


def test_a_run_like_another_has_its_network_but_for_dropout(saved):
    path, run, _ = saved
    mine = replace(
        run, num_steps=9, network=Config(vocab_size=300, length=32, width=32, layers=2, heads=4, dropout=0.3)
    )
    assert like(mine, path) == replace(run, num_steps=9, network=replace(run.network, dropout=0.3))


def test_a_tokenizer_comes_from_a_file_a_checkpoint_or_neither(saved, tmp_path):
    Tokenizer.train([TEXT], 270).save(tmp_path / "tokenizer.json")
    assert tokenizer_of(None, None) is None
    from_start, from_file = tokenizer_of(None, saved[0]), tokenizer_of(tmp_path / "tokenizer.json", saved[0])
    assert from_start is not None and from_start.digest == Tokenizer.bytes().digest
    assert from_file is not None and from_file.vocab_size == 270


def test_a_tokenizer_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    """A half of a tokenizer.json used to stand in the way of the next try."""
    Tokenizer.bytes().save(tmp_path / "tokenizer.json")
    write = Path.write_text

    def write_half(path: Path, text: str, **options: str) -> None:
        write(path, text[: len(text) // 2], **options)
        raise OSError("full")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="full"):
        Tokenizer.train([TEXT], 270).save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert Backend.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == 258


def test_what_a_run_held_out_is_read_from_its_folder(text, tmp_path):
    source = Source(data=str(text), validation=0.3, seed=2)
    made = prepare.prepare(source, tmp_path / "run", vocab_size=258)
    network = Config(vocab_size=258, length=16, width=8, layers=1, heads=1)
    run = Run(algorithm=EsoLM(), network=network, num_steps=1)
    saved = checkpoint.Checkpoint(
        step=1,
        model={"w": torch.ones(1)},
        config=description(run),
        tokenizer_json=made.tokenizer.to_json(),
        state={"origin": source.origin()},
    )
    step = checkpoint.save(tmp_path / "run", saved)
    expected = texts_of(made.tokenizer, made.held_out)
    assert prepare.held_out(tmp_path / "run") == prepare.held_out(step) == expected
    assert 0 < len(expected) < 20
