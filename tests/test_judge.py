"""Judges: what they say of a text is the chain rule over its tokens, whatever is read with it or padded behind it."""

import itertools
import json
import math
import random
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from rich.console import Console

from esolm import checkpoint, judge
from esolm.algorithms import AR, MDLM
from esolm.denoiser import Config, Denoiser
from esolm.judge import Judged, Ours, Pretrained, features, judge_of, judged, measured
from esolm.model import Model
from esolm.texts import as_json, requests_of
from esolm.tokenizer import Tokenizer
from esolm.train import Run, description

TEXTS = [
    "A short one.",
    "Ünï — €€ and a good deal longer than the others are, so that it needs windows",
    "xy",
    "It was. It was.",
]
MODERN = (
    "The city council met on Tuesday evening to discuss the budget for the coming year. Several residents asked for "
    "better roads and more buses, while others wanted the library to stay open on weekends. The mayor said that she "
    "understood these concerns, but that the city would have to make difficult choices, because revenue had fallen."
)


def ours(algorithm=None, length: int = 16) -> Ours:
    network = Config(vocab_size=258, length=length, width=16, layers=1, heads=2)
    denoiser = Denoiser(network, torch.Generator().manual_seed(0))
    with torch.no_grad():
        denoiser.head.weight.mul_(30)
    return Ours(Model(denoiser, algorithm or AR(), Tokenizer.bytes(), dtype="float32"), "ours")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small Llama with random weights and a tokenizer of bytes, as transformers saves them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install esolm[eval]")
    place = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=258, max_position_embeddings=64, initializer_range=0.3, **sizes)
    torch.random.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    path = place / "bytes.json"
    Tokenizer.bytes().save(path)
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(path)).save_pretrained(place)
    path.unlink()
    return place


@pytest.fixture(params=["ours", "pretrained"])
def some_judge(request):
    return ours() if request.param == "ours" else Pretrained.load(str(request.getfixturevalue("folder")), length=16)


def test_a_text_is_judged_the_same_alone_and_among_others(some_judge):
    together = judged(some_judge, TEXTS)
    for text, found in zip(TEXTS, together, strict=True):
        (alone,) = judged(some_judge, [text])
        assert found.nats == pytest.approx(alone.nats, rel=1e-5)
        assert (found.num_tokens, found.num_bytes) == (alone.num_tokens, alone.num_bytes)
        assert found.num_tokens == len(text.encode()) - 1
        assert abs(found.num_bytes - found.num_tokens) <= 2  # the first token may be half a character


def test_a_long_text_is_the_sum_of_its_windows_each_token_scored_once(some_judge):
    ids = some_judge.encode(TEXTS[1])
    assert len(ids) > 3 * some_judge.length
    by_hand, at = 0.0, 0
    while at < len(ids) - 1:
        by_hand += some_judge.nats([ids[at : at + some_judge.length]])[0]
        at += some_judge.length - 1
    assert judged(some_judge, [TEXTS[1]])[0].nats == pytest.approx(by_hand, rel=1e-5)


def test_the_chain_rule_holds_token_by_token(some_judge):
    """Each token's share is the difference of two prefixes."""
    ids = some_judge.encode("It was so")
    prefixes = [some_judge.nats([ids[:end]])[0] for end in range(2, len(ids) + 1)]
    assert all(later > earlier for earlier, later in itertools.pairwise(prefixes))
    assert some_judge.nats([ids, ids[:3]])[0] == pytest.approx(prefixes[-1], rel=1e-5)


def test_a_pretrained_judge_agrees_with_the_loss_that_its_library_computes(folder):
    found = Pretrained.load(str(folder))
    ids = torch.tensor([found.encode(TEXTS[0])])
    with torch.inference_mode():
        loss = found._model(input_ids=ids, labels=ids).loss
    assert found.nats(ids.tolist())[0] == pytest.approx(float(loss) * (ids.shape[1] - 1), rel=1e-5)


def test_an_interrupted_judgement_goes_on(some_judge, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "_TOKENS_AT_ONCE", 1)
    whole = judged(some_judge, TEXTS, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    kept = path.read_bytes()
    path.write_bytes(kept[: len(kept) - 20])
    asked = []
    real = type(some_judge).nats
    monkeypatch.setattr(type(some_judge), "nats", lambda self, windows: asked.append(windows) or real(self, windows))
    assert judged(some_judge, TEXTS, folder=tmp_path) == whole
    assert len(asked) == 1
    assert path.read_bytes() == kept


def test_features_are_of_the_last_token_and_do_not_depend_on_other_texts(some_judge):
    together = features(some_judge, TEXTS)
    for row, text in enumerate(TEXTS):
        assert np.allclose(together[row], features(some_judge, [text])[0], atol=1e-5)
    assert not np.allclose(together[0], together[2], atol=1e-3)


def test_figures_follow_from_what_is_judged():
    found = measured(ours(), TEXTS, name="four")
    each = judged(ours(), TEXTS)
    nats, tokens, size = (sum(getattr(text, part) for text in each) for part in ("nats", "num_tokens", "num_bytes"))
    assert found.perplexity == pytest.approx(math.exp(nats / tokens))
    assert found.bits_per_byte == pytest.approx(nats / size / math.log(2))
    assert found.interval[0] <= found.perplexity <= found.interval[1]
    assert found.facts == {
        "judge": "ours",
        "tokenizer": Tokenizer.bytes().digest[:12],
        "dtype": "float32",
        "length": 16,
        "seed": "not recorded",
        "top_p": "not recorded",
        "temperature": "not recorded",
        "seed_of_judging": 0,
    }
    assert found == measured(ours(), TEXTS, name="four")


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: judged(ours(), ["fine", ""]), ValueError, "text 1 has too few tokens for a judge, 0"),
        (lambda: judged(ours(), ["x"]), ValueError, "text 0 has too few tokens for a judge, 1"),
        (lambda: ours(MDLM()), ValueError, "a judge must be autoregressive"),
        (lambda: judge_of("nowhere/to-be-found"), ValueError, "cannot load the judge 'nowhere/to-be-found'"),
        (lambda: judge_of("missing.gguf"), ValueError, "there is no judge at missing.gguf"),
        (lambda: measured(ours(), TEXTS, real=TEXTS), ValueError, "MAUVE needs at least 50 texts"),
    ],
)
def test_a_judge_or_a_text_that_will_not_do_is_said(call, kind, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(kind, match=words):
        call()


def test_a_judge_that_is_broken_is_said_and_scores_before_are_kept(tmp_path):
    """Scores of texts that were read together with the broken one were lost once."""
    broken = ours()
    with torch.no_grad():
        broken._model.denoiser.embed.weight[ord("x")] = math.nan
    with pytest.raises(ArithmeticError, match="the score of text 2 under ours is nan"):
        judged(broken, TEXTS, folder=tmp_path)
    (kept,) = tmp_path.iterdir()
    assert [json.loads(line) for line in kept.read_text().splitlines()[1:]] == [
        vars(found) for found in judged(ours(), TEXTS[:2])
    ]


def test_the_command_judges_files_by_a_run_of_ours(tmp_path, capsys):
    from esolm.cli import main

    found = ours()
    run = Run(algorithm=AR(), network=found._model.denoiser.config, num_steps=1)
    saved = checkpoint.Checkpoint(
        step=1,
        model=dict(found._model.denoiser.named_parameters()),
        config=description(run),
        tokenizer_json=Tokenizer.bytes().to_json(),
        state={"seconds": 1.0, "origin": {}},
    )
    checkpoint.save(tmp_path / "ar", saved)
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    call = ["judge", str(tmp_path / "texts.jsonl"), "--by", str(tmp_path / "ar")]
    main([*call, "--json", "--out", str(tmp_path / "out")])
    told = json.loads(capsys.readouterr().out)
    assert told["perplexity"] == pytest.approx(measured(ours(), TEXTS).perplexity)
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", ".jsonl", ".md"]
    assert json.loads((tmp_path / "out/table.json").read_text()) == [told]
    assert (tmp_path / "out/table.md").read_text().count("\n") == 3
    main(call)
    assert "quality under a judge" in capsys.readouterr().out


def test_the_table_is_there_after_each_file_and_another_commands_is_not_replaced(tmp_path, capsys, monkeypatch):
    """Only the last file was followed by a table: whoever stopped before had none."""
    from esolm.cli import main

    monkeypatch.setattr(judge, "judge_of", lambda *_, **__: ours())
    (tmp_path / "fine.txt").write_text(TEXTS[0])
    (tmp_path / "short.txt").write_text("x")
    call = ["judge", str(tmp_path / "fine.txt"), str(tmp_path / "short.txt"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(call)
    assert "too few tokens" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "out/table.json").read_text())
    assert row["name"] == str(tmp_path / "fine.txt") and row["num_texts"] == 1
    (tmp_path / "out/table.json").write_text('[{"entropy": 1.0}, {"entropy": 2.0}]')  # of a call that had more files
    with pytest.raises(SystemExit):
        main(call)
    assert "too few tokens" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out/table.json").read_text())) == 2
    for other in ('[{"kind": "NELBO"}]', "mine"):
        (tmp_path / "out/table.json").write_text(other)
        with pytest.raises(SystemExit):
            main(call)
        assert "would be lost: choose another --out" in capsys.readouterr().err
        assert (tmp_path / "out/table.json").read_text() == other


def test_a_figure_records_how_its_texts_were_drawn_as_sample_wrote_it(tmp_path, capsys, monkeypatch):
    """Top-p and seed of the texts were in no figure, and top-p not in the file either."""
    from esolm.cli import main

    monkeypatch.setattr(judge, "judge_of", lambda *_, **__: ours())
    model = ours()._model
    for name, top_p in (("a", 0.9), ("b", 0.5)):
        first = model.request(top_p=top_p, temperature=0.7)
        as_json(model, requests_of(first, 3, seed=4), tmp_path / f"{name}.jsonl", console=Console(quiet=True))
    both = "".join((tmp_path / f"{name}.jsonl").read_text() for name in "ab")
    (tmp_path / "both.jsonl").write_text(both)
    (tmp_path / "some.jsonl").write_text(both + '{"text": "by hand"}\n')
    (tmp_path / "plain.txt").write_text("by hand")
    files = [str(tmp_path / name) for name in ("a.jsonl", "both.jsonl", "some.jsonl", "plain.txt")]
    main(["judge", *files, "--json", "--out", str(tmp_path / "out"), "--seed", "2"])
    facts = [json.loads(line)["facts"] for line in capsys.readouterr().out.splitlines()]
    assert [(each["top_p"], each["seed"], each["temperature"]) for each in facts] == [
        (0.9, 4, 0.7),
        ([0.5, 0.9], 4, 0.7),
        ("not recorded", "not recorded", "not recorded"),
        ("not recorded", "not recorded", "not recorded"),
    ]
    assert {each["seed_of_judging"] for each in facts} == {2}
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    assert "| 0.9 | 4 |" in lines[2] and "| 0.5 and 1 more | 4 |" in lines[3] and "| not recorded |" in lines[4]
    main(["judge", files[0]])
    assert "texts: top-p 0.9, seed 4. judge: tokenizer" in " ".join(capsys.readouterr().out.split())


def test_mauve_that_cannot_be_had_is_told_before_a_judge_is_loaded_or_a_text_written(tmp_path, capsys, monkeypatch):
    """A missing package came to light after hours of judging, too few texts of a second file after the first's."""
    from esolm.cli import main

    def asked(*_, **__):
        pytest.fail("work was done")

    monkeypatch.setattr(judge, "judge_of", asked)
    monkeypatch.setattr(judge, "judged", asked)
    monkeypatch.setitem(sys.modules, "mauve", ModuleType("mauve"))
    (tmp_path / "real.txt").write_text("It was here when he left. " * 400)
    for name, count in (("many", 60), ("few", 49)):
        lines = [json.dumps({"text": f"text {number}"}) + "\n" for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    many, few, real = (str(tmp_path / name) for name in ("many.jsonl", "few.jsonl", "real.txt"))
    for command, missing, words in (
        (["judge", many, few, "--real", real], False, "MAUVE needs at least 50 texts on each side, got 49"),
        (["judge", many, "--real", real], True, 'MAUVE needs the extra: pip install "esolm[eval]"'),
        (["frontier", "no", "--out", "no", "--real", real, "--num", "8"], False, "at least 50 texts"),
        (["frontier", "no", "--out", "no", "--real", real, "--num", "64"], True, "MAUVE needs the extra"),
    ):
        if missing:
            monkeypatch.setitem(sys.modules, "mauve", None)
        with pytest.raises(SystemExit) as end:
            main(command)
        told = capsys.readouterr().err
        assert end.value.code == 2 and words in told and told.count("\n") == 1, told
        monkeypatch.setitem(sys.modules, "mauve", ModuleType("mauve"))
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ValueError, match="MAUVE needs the extra"):
        measured(ours(), ["a text"] * 50, real=["a text"] * 50)


def test_figures_of_texts_too_short_for_them_are_no_numbers_and_are_kept(tmp_path):
    rows = [measured(ours(), ["xyz"])]
    assert math.isnan(rows[0].repetition_4)
    judge.keep(rows, tmp_path)
    assert json.loads((tmp_path / "table.json").read_text())[0]["repetition_4"] is None


@pytest.mark.slow
def test_the_default_judge_tells_prose_from_shuffled_words_and_those_from_noise():
    """A copy with queries and keys left permuted gives about 96 for prose; right, it is about 20."""
    try:
        found = judge_of("smollm2")
    except ValueError as problem:
        pytest.skip(str(problem))
    words = MODERN.split()
    random.Random(0).shuffle(words)
    noise = found._tokenizer.decode(np.random.default_rng(0).integers(100, 49_000, 200))
    prose, shuffled, random_ids = (measured(found, [text]).perplexity for text in (MODERN, " ".join(words), noise))
    assert prose < 60
    assert shuffled > 10 * prose
    assert random_ids > 20 * shuffled
    assert isinstance(judged(found, [MODERN])[0], Judged)
