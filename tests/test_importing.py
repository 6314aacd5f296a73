"""The authors' files and folders become checkpoints: the same logits, the right method, nothing lost in silence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import esolm
from esolm import checkpoint, cli
from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.algorithms.algorithm import Batch
from esolm.attention import Relation
from esolm.checkpoint import CheckpointError
from esolm.importers import from_authors, import_model
from esolm.tokenizer import MASK, Tokenizer
from test_against_reference import hidden_of
from test_importers import HEADS, LAYERS, LENGTH, VOCAB, WIDTH, their_logits, theirs
from theirs_written import SETTINGS, parameters, words, written

REFERENCE = Path(__file__).parent / "reference"
FILE = REFERENCE / "a.esolm.lightning.ckpt"
TOKENS = torch.randint(0, VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(path: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """What the imported network says, every row reading every row."""
    denoiser = esolm.load(path, dtype="float32").denoiser
    return denoiser.logits(denoiser(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), Relation())).double()


def assert_same(path: Path, weights: dict[str, torch.Tensor], conditioned: bool = True) -> None:
    expected = their_logits(weights, TOKENS, conditioned)
    torch.testing.assert_close(logits_of(path), expected, rtol=0, atol=1e-5)


# -- the file that the authors' trainer wrote --------------------------------------------------------------


def test_the_averaged_weights_of_the_reference_are_those_beside_it(tmp_path):
    found = import_model(FILE, tmp_path)
    assert found.algorithm == EsoLM(variant="B", alpha_0=0.5)
    assert found.path.name == "step-000250000"
    _, expected = from_authors(load_file(REFERENCE / "a.esolm.weights.safetensors"), 32)
    saved = checkpoint.load(found.path).model
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_the_raw_weights_of_the_reference_are_others(tmp_path):
    raw, mean = (import_model(FILE, tmp_path / kind, weights=kind).path for kind in ("raw", "ema"))
    raw, mean = checkpoint.load(raw).model, checkpoint.load(mean).model
    assert not any(torch.equal(raw[name], mean[name]) for name in raw)


def test_logits_of_the_imported_reference_match_the_authors(tmp_path):
    import_model(FILE, tmp_path)
    case = load_file(REFERENCE / "a.cases.safetensors")
    model = esolm.load(tmp_path, dtype="float32")
    order, sorted_z = case["B.diffusion.order"], case["B.diffusion.zt_sorted"]
    masked = torch.zeros_like(sorted_z, dtype=torch.bool).scatter(1, order, sorted_z == 95)
    weight = torch.ones(len(order), 1).double()
    view = model.algorithm.diffusion_of(Batch.of(case["x0"]), masked, order, weight, 95)
    ours = model.denoiser.logits(hidden_of(model.denoiser, view))
    torch.testing.assert_close(ours[..., :-1], case["B.diffusion.logits"][..., :-1], rtol=0, atol=1e-5)


def test_the_imported_reference_writes_and_is_scored(tmp_path, capsys):
    cli.main(["import", str(FILE), "--out", str(tmp_path / "run")])
    told = capsys.readouterr().out
    for words_ in (
        "alpha_0=0.5",
        "2 layers, width 64",
        "averaged (ema), step 250,000",
        "the raw weights",
        "DictConfig",
    ):
        assert words_ in told
    cli.main(["sample", str(tmp_path / "run"), "--json"])
    written_text = json.loads(capsys.readouterr().out)["text"]
    assert len(written_text.split()) == 32 and set(written_text.split()) <= {f"t{n}" for n in range(95)}
    (tmp_path / "text.txt").write_text("t3")
    cli.main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "text.txt"), "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] == 1  # there is no end-of-text to score
    cli.main(["info", str(tmp_path / "run")])
    assert "a.esolm.lightning.ckpt" in capsys.readouterr().out


# -- methods, sizes and weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algo", "more", "expected"),
    [
        (SETTINGS["esolm"], {}, EsoLM(variant="B", alpha_0=0.25)),
        (SETTINGS["esolm"] | {"batch_split": 0.75, "loss_type": "low_var"}, {}, None),
        (
            SETTINGS["esolm"] | {"diffusion_attn_mode": "mixed2", "sequential_attn_mode": "mixed"},
            {},
            EsoLM(variant="A", alpha_0=0.25, shuffle_masks=True),
        ),
        (
            SETTINGS["esolm"]
            | {"diffusion_attn_mode": "mixed2", "sequential_attn_mode": "mixed", "diffusion_shuffle": False},
            {},
            EsoLM(variant="A", alpha_0=0.25),
        ),
        (SETTINGS["esolm"] | {"alpha_0": 1, "sequential_attn_mode": "mixed"}, {}, EsoLM(variant="B", alpha_0=1.0)),
        (SETTINGS["esolm"] | {"alpha_0": 1.0, "diffusion_attn_mode": "bidirectional"}, {}, MDLM()),
        (SETTINGS["mdlm"], {}, MDLM()),
        (SETTINGS["mdlm"] | {"loss_type": "low_var"}, {}, MDLM(low_variance=True)),
        (SETTINGS["bd3lm"] | {"ignore_bos": True}, {"block_size": 5}, BD3LM(block_size=5)),
        (SETTINGS["bd3lm"], {"block_size": "${model.length}"}, BD3LM(block_size=LENGTH)),
    ],
)
def test_the_method_is_the_one_of_the_settings(tmp_path, algo, more, expected):
    _, mean = written(tmp_path / "file", algo=algo, more=more)
    found = import_model(tmp_path / "file", tmp_path / "run")
    assert ("ignore_bos" in found.told["changed"]) == ("ignore_bos" in algo)
    assert found.algorithm == (expected or EsoLM(alpha_0=0.25, batch_split=0.75, low_variance=True))
    sizes = (found.network.width, found.network.layers, found.network.heads, found.network.length)
    assert sizes == (WIDTH, LAYERS, HEADS, LENGTH)
    assert_same(tmp_path / "run", mean)


def test_the_older_settings_of_mdlm_are_understood(tmp_path):
    more = {"parameterization": "subs", "backbone": "dit", "time_conditioning": False}
    written(tmp_path / "file", algo={}, more=more)
    assert import_model(tmp_path / "file", tmp_path / "run").algorithm == MDLM()


@pytest.mark.parametrize("front", ["mask", "bos", "none", "older", None])
def test_what_stands_in_front_of_a_text_is_what_the_network_learned_with(tmp_path, front):
    """An AR network of theirs may begin with end-of-text where ours has the mask: then the mask gets its row."""
    algo = {"name": "ar", **({"prepend_token": front} if front in ("mask", "bos", "none") else {})}
    algo |= {"ignore_bos": False} if front == "older" else {}
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    tokenizer = words(**{"<|endoftext|>": 3})
    _, mean = written(tmp_path / "file", algo=algo, conditioned=False, tokenizer=tokenizer, special=special)
    found = import_model(tmp_path / "file", tmp_path / "run")
    assert found.algorithm == AR()
    if front in ("bos", "none", "older"):
        mean["vocab_embed.embedding"][VOCAB - 1] = mean["vocab_embed.embedding"][3]
        assert "id 3" in found.told["changed"]
    assert ("does not say" in found.told["changed"]) == (front is None)
    assert_same(tmp_path / "run", mean, conditioned=False)


def test_raw_weights_are_taken_where_they_are_asked_for_or_alone(tmp_path):
    raw, _ = written(tmp_path / "file")
    import_model(tmp_path / "file", tmp_path / "raw", weights="raw")
    assert_same(tmp_path / "raw", raw)
    raw, _ = written(tmp_path / "alone", average=False)
    assert "no averaged" in import_model(tmp_path / "alone", tmp_path / "run").told["weights"]
    assert_same(tmp_path / "run", raw)
    with pytest.raises(CheckpointError, match=r"holds no averaged weights.*--weights raw"):
        import_model(tmp_path / "alone", tmp_path / "other", weights="ema")


def test_names_of_a_compiled_module_are_the_same_names(tmp_path):
    compiled = {f"backbone._orig_mod.{name}": tensor for name, tensor in theirs(True).items()}
    raw, _ = written(tmp_path / "file", average=False, state_dict=compiled)
    import_model(tmp_path / "file", tmp_path / "run")
    assert_same(tmp_path / "run", raw)


# -- what a file does not say ------------------------------------------------------------------------------


def test_a_file_without_settings_is_asked_about(tmp_path):
    _, mean = written(tmp_path / "file", algo=None)
    with pytest.raises(ValueError, match="does not say its method: name it with --model"):
        import_model(tmp_path / "file", tmp_path / "run")
    with pytest.raises(ValueError, match="give --length"):
        import_model(tmp_path / "file", tmp_path / "run", algorithm=MDLM())
    assert import_model(tmp_path / "file", tmp_path / "run", algorithm=MDLM(), length=LENGTH).algorithm == MDLM()
    assert_same(tmp_path / "run", mean)


def test_options_that_contradict_a_file_are_refused(tmp_path):
    written(tmp_path / "file")
    with pytest.raises(ValueError, match=r"it holds EsoLM.*leave out --model"):
        import_model(tmp_path / "file", tmp_path / "run", algorithm=MDLM())
    with pytest.raises(ValueError, match="texts of 5 tokens, not 7"):
        import_model(tmp_path / "file", tmp_path / "run", length=7)
    import_model(tmp_path / "file", tmp_path / "run", algorithm=EsoLM(alpha_0=0.25), length=LENGTH)
    with pytest.raises(ValueError, match="already holds a run"):
        import_model(tmp_path / "file", tmp_path / "run")


@pytest.mark.parametrize(
    ("algo", "more", "words_"),
    [
        ({"name": "sedd"}, {}, "'sedd' is not built here; there are ar, mdlm"),
        (SETTINGS["mdlm"] | {"time_conditioning": True}, {}, "told the time"),
        (SETTINGS["esolm"] | {"alpha_0": 3}, {}, "alpha_0 must lie in"),
        (SETTINGS["esolm"] | {"diffusion_attn_mode": "bidirectional"}, {}, "neither Eso-LM .A. nor .B."),
        (SETTINGS["bd3lm"], {"block_size": "four"}, "block_size must be a positive whole number"),
        (SETTINGS["bd3lm"], {"block_size": 3}, "block"),
        (SETTINGS["mdlm"], {"model": {"length": LENGTH, "n_heads": 3}}, "heads"),
    ],
)
def test_what_our_networks_cannot_do_is_refused(tmp_path, algo, more, words_):
    written(tmp_path / "file", algo=algo, more=more)
    with pytest.raises(ValueError, match=words_):
        import_model(tmp_path / "file", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [lambda means: means[:-1], lambda means: means[::-1]])
def test_averaged_weights_of_another_network_are_refused(tmp_path, change):
    weights = theirs(True)
    means = change([weights[name] for name in parameters(weights)])
    written(tmp_path / "file", average=False, ema={"shadow_params": means})
    with pytest.raises(CheckpointError, match="averaged weights"):
        import_model(tmp_path / "file", tmp_path / "run")


# -- tokenizers --------------------------------------------------------------------------------------------


def test_the_tokenizer_of_the_file_is_kept_and_gets_the_mask(tmp_path):
    written(tmp_path / "file", tokenizer=words(**{"<|endoftext|>": 4}), special={"eos_token": "<|endoftext|>"})
    import_model(tmp_path / "file", tmp_path / "run")
    tokenizer = esolm.load(tmp_path / "run").tokenizer
    assert (tokenizer.end_id, tokenizer.mask_id) == (4, VOCAB - 1)
    assert tokenizer.encode("w1 w5 w2") == [1, 5, 2]


@pytest.mark.parametrize(
    ("change", "words_"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "a part 'Precompiled'"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "FixedLength", "length": 0}]}},
            "FixedLength",
        ),
        ({"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}, "no tokenizer.json"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 5}, "merges": ["x y"]}}, "no tokenizer.json"),
        ({"model": 3}, "no tokenizer.json"),
    ],
)
def test_a_hostile_tokenizer_in_a_file_is_one_line(tmp_path, change, words_, capfd):
    """The library panics over some: a traceback of Rust, and an error that no handler of errors catches."""
    hostile = json.dumps({**json.loads(words(**{"<|endoftext|>": 4})), **change})
    written(tmp_path / "file", tokenizer=hostile)
    with pytest.raises(SystemExit):
        cli.main(["import", str(tmp_path / "file"), "--out", str(tmp_path / "run")])
    told = capfd.readouterr().err
    assert words_ in told and told.count("\n") == 1


def test_an_end_of_text_of_another_name_gets_ours(tmp_path):
    written(tmp_path / "file", tokenizer=words(**{"[STOP]": 2}), special={"eos_token": "[STOP]"})
    import_model(tmp_path / "file", tmp_path / "run")
    assert esolm.load(tmp_path / "run").tokenizer.end_id == 2


def test_a_padding_token_with_the_mask_s_id_is_left_out(tmp_path):
    """Their loader gives GPT-2 a "[PAD]" behind its last id, which is the id of the network's mask."""
    written(tmp_path / "file", tokenizer=words(**{"<|endoftext|>": 5, "[PAD]": VOCAB - 1}))
    import_model(tmp_path / "file", tmp_path / "run")
    tokenizer = esolm.load(tmp_path / "run").tokenizer
    assert tokenizer.mask_id == VOCAB - 1 and "[PAD]" not in tokenizer.to_json() and MASK in tokenizer.to_json()


def test_a_mask_in_the_middle_becomes_the_last_id(tmp_path):
    """BERT's mask is id 103: the network gets an id more, and the old one is never written."""
    special = {"mask_token": "[MASK]", "eos_token": "[SEP]"}
    _, mean = written(tmp_path / "file", tokenizer=words(VOCAB, **{"[MASK]": 3, "[SEP]": 1}), special=special)
    found = import_model(tmp_path / "file", tmp_path / "run")
    model = esolm.load(tmp_path / "run", dtype="float32")
    assert (found.network.vocab_size, model.tokenizer.mask_id, model.tokenizer.end_id) == (VOCAB + 1, VOCAB, 1)
    ours = logits_of(tmp_path / "run", TOKENS.masked_fill(TOKENS == 3, VOCAB))
    others = [token for token in range(VOCAB) if token != 3]
    torch.testing.assert_close(ours[..., others], their_logits(mean, TOKENS, True)[..., others], rtol=0, atol=1e-5)
    assert bool((ours[..., 3] == -1e4).all())
    text = model.sample(20, seed=1)
    assert "[MASK]" not in " ".join(text)


def test_bert_s_tokenizer_in_plain_python_is_kept(tmp_path):
    """What the One Billion Words runs hold: no tokenizer.json, and a mask in the middle."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##able"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    python = {"kind": "BertTokenizer", "vocab": vocab, "basic_tokenizer": "BasicTokenizer", "_mask_token": "[MASK]"}
    python |= {"wordpiece_tokenizer": "WordpieceTokenizer", "_sep_token": "[SEP]"}
    assert len(pieces) == VOCAB
    written(tmp_path / "file", python=python)
    found = import_model(tmp_path / "file", tmp_path / "run")
    tokenizer = esolm.load(tmp_path / "run").tokenizer
    assert tokenizer.encode("Unable un") == [5, 6, 5] and tokenizer.decode([5, 6, 5]) == "unable un"
    assert (tokenizer.end_id, tokenizer.mask_id) == (3, VOCAB) and "id 4 in the file" in found.told["changed"]


def test_gpt2_s_tokenizer_in_plain_python_is_kept(tmp_path):
    vocab = {"a": 0, "b": 1, "Ġ": 2, "ab": 3, "Ġab": 4, "<|endoftext|>": 5}
    ranks = {("a", "b"): 0, ("Ġ", "ab"): 1}
    python = {"kind": "GPT2Tokenizer", "encoder": vocab, "bpe_ranks": ranks, "_eos_token": "<|endoftext|>"}
    written(tmp_path / "file", python=python)
    import_model(tmp_path / "file", tmp_path / "run")
    tokenizer = esolm.load(tmp_path / "run").tokenizer
    assert tokenizer.encode("ab ab b") == [3, 4, 2, 1] and tokenizer.end_id == 5


def test_without_a_tokenizer_ids_are_numbers_and_that_is_said(tmp_path):
    written(tmp_path / "file")
    found = import_model(tmp_path / "file", tmp_path / "run")
    assert "none (the file names 'gpt2')" in found.told["tokenizer"] and "--tokenizer" in found.told["tokenizer"]
    model = esolm.load(tmp_path / "run")
    assert model.tokenizer.encode("3 1") == [3, 1] and model.tokenizer.end_id is None
    assert set(model.sample(1)[0].split()) <= {str(n) for n in range(VOCAB - 1)}
    with pytest.raises(ValueError, match="no ids for this text"):
        model.sample(1, prompt="JULIET")


def test_a_tokenizer_is_taken_from_a_file_where_it_fits(tmp_path):
    written(tmp_path / "file")
    (tmp_path / "tokenizer.json").write_text(words(**{"<|endoftext|>": 0}))
    import_model(tmp_path / "file", tmp_path / "run", tokenizer=tmp_path / "tokenizer.json")
    assert esolm.load(tmp_path / "run").tokenizer.end_id == 0
    Tokenizer.bytes().save(tmp_path / "bytes.json")
    with pytest.raises(ValueError, match="6 ids and a mask, the tokenizer 257"):
        import_model(tmp_path / "file", tmp_path / "other", tokenizer=tmp_path / "bytes.json")


# -- published folders -------------------------------------------------------------------------------------

BD3 = {"model_type": "bd3lm", "block_size": 5, "cross_attn": True, "adaln": True, "causal": False}
SIZES = {"vocab_size": VOCAB, "model_length": LENGTH, "hidden_dim": WIDTH, "n_blocks": LAYERS, "n_heads": HEADS}


def published(folder: Path, config: dict, weights: dict, *, shards: int = 1, dtype=torch.float32) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SIZES, "time_conditioning": False, **config}))
    tensors = {f"backbone.{name}": tensor.to(dtype) for name, tensor in weights.items()}
    tensors |= {"sampling_eps_min": torch.tensor(1e-3)}
    names = sorted(tensors)
    files = [
        f"model-{n + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors" for n in range(shards)
    ]
    for number, file in enumerate(files):
        save_file({name: tensors[name] for name in names[number::shards]}, folder / file)
    if shards > 1:
        index = {"weight_map": {name: files[number % shards] for number, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("config", "conditioned", "expected"),
    [
        (BD3, True, BD3LM(block_size=5)),
        (BD3 | {"block_size": 1}, True, BD3LM(block_size=1)),
        (BD3 | {"adaln": False}, False, BD3LM(block_size=5)),
        (BD3 | {"cross_attn": False}, True, MDLM()),
        ({"model_type": "mdlm"}, True, MDLM()),
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_published_folders(tmp_path, config, conditioned, expected, shards):
    weights = theirs(conditioned)
    found = import_model(published(tmp_path / "hub", config, weights, shards=shards), tmp_path / "run")
    assert found.algorithm == expected and "sampling_eps_min" in found.told["dropped"]
    assert_same(tmp_path / "run", weights, conditioned)


def test_a_published_eso_lm_does_not_say_its_variant_nor_alpha_0(tmp_path):
    weights = theirs(True)
    folder = published(tmp_path / "hub", {"model_type": "EsoLM", "mask_index": VOCAB - 1}, weights)
    with pytest.raises(ValueError, match="does not say its method: name it with --model"):
        import_model(folder, tmp_path / "run")
    found = import_model(folder, tmp_path / "run", algorithm=EsoLM(variant="A", alpha_0=0.5))
    assert found.algorithm == EsoLM(variant="A", alpha_0=0.5)
    assert_same(tmp_path / "run", weights)


@pytest.mark.parametrize("place", [-1, VOCAB, "last", True])
def test_a_mask_that_is_no_id_is_refused(tmp_path, place):
    folder = published(tmp_path / "hub", {"model_type": "mdlm", "mask_index": place}, theirs(True))
    with pytest.raises(ValueError, match="mask_index must be one of the 7 ids"):
        import_model(folder, tmp_path / "run")


def test_a_published_autoregressive_network_begins_with_end_of_text(tmp_path):
    weights, config = theirs(False), BD3 | {"causal": True, "cross_attn": False, "adaln": False, "block_size": 1}
    folder = published(tmp_path / "hub", config, weights)
    (folder / "tokenizer.json").write_text(words(**{"<|endoftext|>": 2}))
    assert import_model(folder, tmp_path / "run").algorithm == AR()
    weights["vocab_embed.embedding"][-1] = weights["vocab_embed.embedding"][2]
    assert_same(tmp_path / "run", weights, conditioned=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_become_float32(tmp_path, dtype):
    weights = {name: tensor.to(dtype).float() for name, tensor in theirs(True).items()}
    import_model(published(tmp_path / "hub", BD3, weights, dtype=dtype), tmp_path / "run")
    assert {tensor.dtype for tensor in checkpoint.load(tmp_path / "run").model.values()} == {torch.float32}
    assert_same(tmp_path / "run", weights)


def test_a_folder_with_a_file_of_torch(tmp_path):
    weights = theirs(True)
    folder = published(tmp_path / "hub", {"model_type": "mdlm"}, weights)
    (folder / "model.safetensors").unlink()
    torch.save({f"backbone.{name}": tensor for name, tensor in weights.items()}, folder / "pytorch_model.bin")
    import_model(folder, tmp_path / "run")
    assert_same(tmp_path / "run", weights)


@pytest.mark.parametrize(
    ("spoil", "words_"),
    [
        (lambda f: (f / "config.json").unlink(), "without config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'), "model_type is 'gpt2'"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "mdlm", "time_conditioning": true}'),
            "told the time",
        ),
        (lambda f: (f / "config.json").write_text('{"model_type": "bd3lm"}'), "no block_size"),
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "model-00002"),
        (lambda f: (f / "model-00002-of-00002.safetensors").write_bytes(b"x" * 100), "cannot import"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'), "maps no names"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "there are no weights in it"),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path, spoil, words_, capsys):
    folder = published(tmp_path / "hub", BD3, theirs(True), shards=2)
    spoil(folder)
    with pytest.raises(SystemExit) as end:
        cli.main(["import", str(folder), "--out", str(tmp_path / "run")])
    told = capsys.readouterr().err
    assert end.value.code == 3 and words_ in told and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "code", "words_"),
    [
        (["--alpha-0", "0.5"], 2, "go with --model"),
        (["--model", "esolm-b"], 2, "needs --alpha-0"),
        (["--model", "bd3lm"], 2, "needs --block-size"),
        (["--weights", "best"], 2, "raw, ema"),
        (["--tokenizer", "nowhere"], 2, "there is no tokenizer at nowhere"),
    ],
)
def test_options_are_checked(tmp_path, options, code, words_, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["import", str(FILE), "--out", str(tmp_path / "run"), *options])
    told = capsys.readouterr().err
    assert end.value.code == code and words_ in told and told.count("\n") == 1
