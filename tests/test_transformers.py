"""Our models in the transformers library: the core's logits bit for bit, its texts, and the way there and back."""

import copy
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="TRANSFORMERS IS NOT INSTALLED: pip install 'esolm[transformers]'")
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, GenerationConfig
from transformers.generation.streamers import BaseStreamer

import esolm
from esolm.algorithms import AR, BD3LM, MDLM, EsoLM
from esolm.algorithms.algorithm import Batch, Request
from esolm.attention import relation
from esolm.denoiser import Config, Denoiser
from esolm.model import Model
from esolm.sample import Writer
from esolm.tokenizer import Tokenizer
from esolm.train import learn
from esolm.transformers import EsoLMConfig, EsoLMForMaskedDiffusion, of, to_checkpoint

METHODS = [AR(), MDLM(), BD3LM(block_size=4), EsoLM(variant="A", alpha_0=0.5), EsoLM(alpha_0=0.5)]
each_method = pytest.mark.parametrize("method", METHODS, ids=["ar", "mdlm", "bd3lm", "esolm-a", "esolm-b"])
MASK, END = 257, 256


def model_of(method=None, **sizes) -> Model:
    config = Config(vocab_size=258, length=24, width=32, layers=2, heads=2, **sizes)
    return Model(
        Denoiser(config, torch.Generator().manual_seed(3)),
        EsoLM(alpha_0=0.5) if method is None else method,
        Tokenizer.bytes(),
        dtype="float32",
        facts={"step": 7},
    )


class Heard(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.tolist())

    def end(self):
        self.ended = True


@each_method
def test_a_folder_and_back(tmp_path, method):
    ours = model_of(method, gated=True, kv_heads=1, rms_norm=True)
    theirs, tokenizer = of(ours)
    theirs.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    read, words = (
        AutoModelForMaskedLM.from_pretrained(tmp_path / "folder"),
        AutoTokenizer.from_pretrained(tmp_path / "folder"),
    )
    assert type(read) is type(AutoModel.from_pretrained(tmp_path / "folder")) is EsoLMForMaskedDiffusion
    assert AutoConfig.from_pretrained(tmp_path / "folder").method == method
    assert sorted(path.name for path in (tmp_path / "folder").glob("*.bin")) == []
    back = esolm.load(to_checkpoint(read, words, tmp_path / "run"))
    assert back.digest == ours.digest
    assert (back.algorithm, back.denoiser.config, back.facts["step"]) == (method, ours.denoiser.config, 7)
    assert back.tokenizer.encode("Été <|mask|>") == ours.tokenizer.encode("Été <|mask|>")


def test_logits_are_those_of_the_core_bit_for_bit(tmp_path):
    ours = model_of()
    of(ours)[0].save_pretrained(tmp_path)
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert (theirs.dtype, theirs.training) == (torch.float32, False)
    rng = torch.Generator().manual_seed(0)
    tokens, positions = (torch.randint(n, (3, 20), generator=rng) for n in (258, 24))
    stage, public = torch.randint(4, (3, 20), generator=rng), torch.rand(3, 20, generator=rng) < 0.5
    core = ours.denoiser.logits(ours.denoiser(tokens, positions, relation(stage, public)))
    assert torch.equal(theirs(tokens, position_ids=positions, stage=stage, public=public).logits, core)


@each_method
def test_a_mask_alone_is_shown_what_the_sampler_shows_it(method):
    """The first token that is written one at a time, in a text with left padding."""
    ours = model_of(method)
    alpha_0 = {"alpha_0": 0.0} if isinstance(method, EsoLM) else {}
    first, length = [10, 20, 30, 40, 50, 60], 12
    holes = {} if isinstance(method, AR | BD3LM) else {11: 99}
    given = dict(enumerate(first)) | holes
    writer = Writer(ours.writer, method, [Request(length=length, given=given, **alpha_0)])
    with torch.inference_mode():
        hidden, _, rank = writer.evaluate()
        expected = ours.denoiser.logits(hidden[:1])[0]
    place = int(writer._plans.order[0, rank[0]])
    ids = torch.tensor([[given.get(at, MASK) for at in range(length)]])
    theirs = of(ours)[0]
    padded = torch.cat((torch.full((1, 3), END), ids), 1)
    found = theirs(padded, attention_mask=(torch.arange(length + 3) > 2)[None].long()).logits[0, place + 3]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs(ids).logits[0, place], expected, atol=1e-5, rtol=0)


@each_method
def test_texts_are_those_of_the_model(method):
    ours = model_of(method)
    theirs, tokenizer = of(ours)
    inputs = tokenizer(["ab", "cdef"], return_tensors="pt", padding=True)
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    out = theirs.generate(
        **inputs, max_new_tokens=8, do_sample=True, temperature=0.8, top_k=40, seed=5, dtype="float32"
    )
    for row, (prompt, number) in enumerate((("ab", 0), ("cdef", 1))):
        seed = esolm.model.seed_of(5, number)
        options = {"temperature": 0.8, "top_k": 40}
        (alone,) = ours.complete([_request(ours, prompt, 8, seed, options)])
        written = out[row][2 * (row == 0) :].tolist()
        assert written[: len(alone.tokens)] == alone.tokens.tolist()
        assert set(written[len(alone.tokens) :]) <= {END}


def _request(model, prompt, new, seed, options):
    draw = esolm.draw.Draw(**options)
    given = dict(enumerate(model.tokenizer.encode(prompt)))
    return Request(length=len(given) + new, given=given, seed=seed, draw=draw)


def test_greedy_is_the_default_and_needs_no_seed():
    theirs, tokenizer = of(model_of())
    inputs = tokenizer("abc", return_tensors="pt")
    options = {"max_new_tokens": 9, "alpha_0": 0.0, "dtype": "float32"}
    one, other = (theirs.generate(**inputs, **options, seed=seed) for seed in (1, 2))
    sampled = [theirs.generate(**inputs, **options, do_sample=True, seed=seed).tolist() for seed in (1, 2)]
    assert one.tolist() == other.tolist()
    assert sampled[0] != sampled[1]
    config = GenerationConfig(max_new_tokens=9, do_sample=True)
    assert (
        theirs.generate(**inputs, generation_config=config, alpha_0=0.0, dtype="float32", seed=1).tolist() == sampled[0]
    )


def test_masks_of_a_prompt_are_written_where_they_stand():
    theirs, tokenizer = of(model_of())
    ids = tokenizer("ab<|mask|><|mask|>cd<|mask|>e", return_tensors="pt")["input_ids"]
    out = theirs.generate(ids, do_sample=True)[0].tolist()
    assert [out[at] for at in (0, 1, 4, 5, 7)] == list(b"abcde")
    assert len(out) == 8
    assert MASK not in out
    assert theirs.generate(ids, do_sample=True, max_length=12).shape == (1, 12)


@pytest.mark.parametrize("num_steps", [None, 2])
def test_a_streamer_hears_the_text_in_reading_order(num_steps):
    theirs, tokenizer = of(model_of())
    options = {"do_sample": True, "num_steps": num_steps, "seed": 4, "dtype": "float32"}
    for text, prompt in (("ab<|mask|><|mask|>c<|mask|>", b"ab"), ("hello", b"hello")):
        heard, ids = Heard(), tokenizer(text, return_tensors="pt")["input_ids"]
        out = theirs.generate(ids, streamer=heard, **options)[0].tolist()
        assert heard.parts[0] == [list(prompt)]
        assert [*heard.parts[0][0], *(token for part in heard.parts[1:] for token in part)] == out
        assert heard.ended
        assert all(len(part) == 1 for part in heard.parts[1:])


def test_a_streamer_hears_tokens_while_the_rest_is_unwritten(monkeypatch):
    theirs, tokenizer = of(model_of())
    heard, times, steps = Heard(), [], []
    hook, accept = heard.put, Writer.accept

    def timed(value):
        times.append(len(steps))
        hook(value)

    heard.put = timed
    monkeypatch.setattr(Writer, "accept", lambda *given: (steps.append(1), accept(*given))[1])
    ids = tokenizer("ab", return_tensors="pt")["input_ids"]
    theirs.generate(ids, streamer=heard, do_sample=True, alpha_0=0.0, max_new_tokens=5, dtype="float32")
    assert times == [0, 1, 2, 3, 4, 5]


def test_a_text_that_ends_has_its_end_and_padding():
    ours = model_of(AR())
    with torch.no_grad():
        ours.denoiser.head.bias[END] += 2.5
    theirs, _ = of(ours)
    ids = torch.tensor([[1, 2]] * 8)
    out = theirs.generate(ids, do_sample=True, max_new_tokens=20, pad_token_id=0).numpy()
    ends = [int(np.argmax(row == END)) for row in out if END in row]
    assert ends
    assert all((row[np.argmax(row == END) + 1 :] == 0).all() for row in out if END in row)


@each_method
def test_the_loss_is_the_one_that_training_takes(method):
    ours = model_of(method)
    theirs = of(ours)[0].train()
    ids = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(1))
    theirs.passes = 3
    theirs(input_ids=ids, labels=ids, seed=9).loss.backward()
    run = esolm.Run(algorithm=method, network=ours.denoiser.config, num_steps=9, batch_size=4, seed=9)
    terms = learn(run, ours.denoiser.train(), Batch.of(ids), 3)
    got = {name: weight.grad for name, weight in theirs.denoiser.named_parameters()}
    for name, weight in ours.denoiser.named_parameters():
        torch.testing.assert_close(got[name], weight.grad, atol=1e-6, rtol=1e-5)
    theirs.passes = 3
    assert theirs(input_ids=ids, labels=ids, seed=9).loss.item() == pytest.approx(sum(terms.values()), abs=1e-5)
    if not isinstance(method, AR):  # which has no noise: every pass of the same texts has the same loss
        assert theirs(input_ids=ids, labels=ids, seed=9).loss.item() != pytest.approx(sum(terms.values()), abs=1e-5)


def test_weights_that_change_are_seen_by_the_next_text():
    theirs, tokenizer = of(model_of(AR()))
    ids = tokenizer("ab", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 8, "dtype": "float32"}
    before = theirs.generate(ids, **options).tolist()
    with torch.no_grad():
        for weight in theirs.denoiser.parameters():
            weight.neg_()
    fresh = EsoLMForMaskedDiffusion(theirs.config)
    fresh.load_state_dict(theirs.state_dict())
    assert theirs.generate(ids, **options).tolist() == fresh.generate(ids, **options).tolist() != before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 4}, "generate has no num_beams"),
        ({"max_new_tokens": 100}, "more than the 24 that the network holds"),
        ({"max_length": 2}, "nothing to write|leaves"),
        ({"temperature": -1.0, "do_sample": True}, "temperature must be at least 0"),
        ({"num_return_sequences": 0}, "there is nothing to write"),
        ({"eos_token_id": [5, 6]}, r"eos_token_id must be one id, got \[5, 6\]"),
        ({"attention_mask": torch.ones(1, 2)}, r"as \[text, token\] .* got \[1, 3\], and attention_mask of \[1, 2\]"),
    ],
)
def test_what_cannot_be_done_is_said(options, words):
    theirs, tokenizer = of(model_of())
    with pytest.raises(ValueError, match=words):
        theirs.generate(tokenizer("abc", return_tensors="pt")["input_ids"], **options)


def test_what_asks_for_nothing_else_is_taken():
    theirs = of(model_of())[0]
    ids = torch.zeros(1, 2, dtype=torch.int64)
    plain = theirs.generate(ids, max_new_tokens=3, seed=1)
    assert torch.equal(theirs.generate(ids, max_new_tokens=3, seed=1, num_beams=1, use_cache=True), plain)


def test_a_prompt_without_a_batch_is_refused_and_so_is_what_forward_would_ignore():
    """Each token of a prompt `[token]` was a text of its own."""
    theirs = of(model_of())[0]
    ids = torch.arange(4)
    for call in (theirs, theirs.generate):
        with pytest.raises(ValueError, match=r"give input_ids as \[text, token\] .* got \[4\]"):
            call(ids)
    for name in ("output_hidden_states", "attention_masks"):
        with pytest.raises(ValueError, match=f"forward has no {name}"):
            theirs(ids[None], **{name: True})
    assert theirs(ids[None], output_hidden_states=False).logits.shape == (1, 4, 258)


def test_an_end_of_text_may_come_as_a_list_of_one():
    theirs = of(model_of())[0]
    ids = torch.tensor([[5, 6]])
    assert torch.equal(theirs.generate(ids, eos_token_id=[7]), theirs.generate(ids, eos_token_id=7))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda theirs: pickle.loads(pickle.dumps(theirs))])
def test_a_model_that_has_written_can_be_copied(copied):
    theirs = of(model_of())[0]
    ids = torch.tensor([[5, 6]])
    assert torch.equal(copied(theirs).generate(ids), theirs.generate(ids))
    assert torch.equal(copied(theirs).generate(ids), theirs.generate(ids))


def test_the_library_trains_alike_whether_it_accumulates_or_not(tmp_path):
    """It took the loss for divided already, since `forward` takes any option: gradients were so many times as large."""
    pytest.importorskip("accelerate", reason="ACCELERATE IS NOT INSTALLED: pip install accelerate")
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))
    data, weights = [{"input_ids": row, "labels": row} for row in ids], []
    for at_once in (1, 2):
        theirs = of(model_of(AR()))[0]
        optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
        options = {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": 2 // at_once}
        steady = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        how = TrainingArguments(str(tmp_path), max_steps=1, max_grad_norm=0, report_to=[], use_cpu=True, **options)
        Trainer(theirs, how, train_dataset=data, optimizers=(optimizer, steady)).train()
        weights.append(theirs.denoiser.head.weight.detach())
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)


def test_weights_of_another_network_are_refused(tmp_path):
    of(model_of())[0].save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.network = {**config.network, "layers": 3}
    with pytest.raises(ValueError, match="do not belong together"):
        EsoLMForMaskedDiffusion.from_pretrained(tmp_path, config=config)
    with pytest.raises(ValueError, match="did you mean 'width'"):
        EsoLMConfig(network={"vocab_size": 9, "length": 8, "wdth": 3})
