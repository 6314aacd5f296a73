"""Our models as models of the transformers library, whose code then works with them.

    import esolm.transformers                       registers with AutoConfig, AutoModel and AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(folder)             what `save_pretrained` of `of(...)` left there
    ids = model.generate(**tokenizer("JULIET.", return_tensors="pt"), max_new_tokens=40, do_sample=True, seed=1)

The library has no entry points, so this import is what makes it know `model_type` "esolm"; `trust_remote_code` is not
needed. The core does all work: `Denoiser` gives logits, `sample.Writer` writes, `objective` is the loss. It is not
registered for causal models: logits of row `i` are those of token `i`, not of the next one.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import MaskedLMOutput

from esolm import checkpoint, objective, plain
from esolm.algorithms import AR, BD3LM, Algorithm, EsoLM
from esolm.algorithms.algorithm import Batch, Request
from esolm.attention import PADDING, relation
from esolm.choice import Choice, refuse, valid_of
from esolm.denoiser import Config, Denoiser, angles
from esolm.draw import Draw
from esolm.inference import Network, prepared
from esolm.model import Model, seed_of
from esolm.noise import Noise, generator
from esolm.products import Dtype
from esolm.sample import Writer
from esolm.tokenizer import Tokenizer

_AT_ONCE = 16  # texts written together
_SMALL = {"vocab_size": 258, "length": 128}  # of a configuration that says nothing: the library makes such ones


class EsoLMConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """The plain data of the network and of the method (any of the five), as in our checkpoints' config.json."""

    __no_type_check__ = True  # the library wraps what dataclasses make of this, so shape checks must not
    model_type = "esolm"
    network: dict[str, Any] | None = None
    algorithm: dict[str, Any] | None = None
    step: int = 0
    end_id: int | None = None

    def __post_init__(self, **rest: Any) -> None:
        """ValueError that lists what is wrong with the network or the method."""
        sizes = plain.from_plain(Config, self.network or _SMALL)
        method = plain.from_plain(Algorithm, self.algorithm or plain.to_plain(EsoLM()))  # type: ignore[type-abstract]
        method.check(sizes)
        self.network, self.algorithm = plain.to_plain(sizes), plain.to_plain(method)
        super().__post_init__(**rest)  # type: ignore[no-untyped-call]

    @property
    def sizes(self) -> Config:
        return plain.from_plain(Config, self.network)

    @property
    def method(self) -> Algorithm:
        return plain.from_plain(Algorithm, self.algorithm)  # type: ignore[type-abstract]

    @property
    def vocab_size(self) -> int:
        return self.sizes.vocab_size


class EsoLMForMaskedDiffusion(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The denoiser with its method. It learns by `forward(labels=...)` and writes by `generate`."""

    config_class = EsoLMConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # the library's Trainer divides by the steps that it accumulates: a loss is a mean here

    def __init__(self, config: EsoLMConfig) -> None:
        super().__init__(config)
        self.denoiser = Denoiser(config.sizes)
        self.algorithm = config.method
        self.passes = 0  # of training: each has random numbers of its own
        self._writer: tuple[object, Network] | None = None
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As the library's, but weights that are missing or left over are a ValueError, not a warning."""
        found: Any = super().from_pretrained(*args, output_loading_info=True, **options)
        model, info = found
        wrong = sorted([*info["missing_keys"], *info["unexpected_keys"]])
        if wrong:
            raise ValueError(f"weights and config.json do not belong together: {wrong[0]} is in one of them only")
        return (model, info) if output_loading_info else model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        stage: Tensor | None = None,
        public: Tensor | None = None,
        seed: int = 0,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> Any:
        """Logits of every row of `input_ids`, in which masks stand where nothing is written; or a loss.

        Each mask is shown what it would read if it were written next, alone (AR: what stands before it). `stage` and
        `public` (with `position_ids`) say otherwise who reads whom: the rule in `attention`.

        `labels` are whole texts (-100: a prompt, whose token is that of `input_ids`): the loss is the method's own,
        with masks of its own, from `seed` and, in training, the number of the pass. There are no logits then.
        """
        if input_ids is None:
            raise ValueError("give input_ids: this network reads tokens, not embeddings")
        refuse("forward", unused)
        valid = valid_of(input_ids, attention_mask)
        if labels is not None:
            out = MaskedLMOutput(loss=self._loss(input_ids, valid, labels, seed))
        elif stage is not None and public is not None:
            places = _places(valid) if position_ids is None else position_ids
            hidden = self.denoiser(input_ids, places, relation(stage, public))
            out = MaskedLMOutput(logits=self.denoiser.logits(hidden))
        else:
            out = MaskedLMOutput(logits=self._look(input_ids, valid))
        return out.to_tuple() if return_dict is False else out

    @torch.inference_mode()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        num_steps: int | None = None,
        alpha_0: float | None = None,
        num_return_sequences: int = 1,
        generation_config: Any = None,
        streamer: Any = None,
        pad_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        dtype: Dtype = "auto",
        **others: Any,
    ) -> Tensor:
        """Texts `[text, token]`: the prompts, with every mask in them written, then the new tokens.

        Padding (left or right, where `attention_mask` is 0) is nothing to the texts; left padding stays in front.
        `max_length` counts the prompt with its padding; without either, the text is as long as the network holds if the
        prompt has no masks, and has no new tokens if it has. A text without masks ends with its end-of-text.
        Greedy unless `do_sample`; the same `seed` writes the same texts (the library's global seed does nothing), those
        of `Model.sample` with the same options. The texts of one prompt stand together.

        A `streamer` (one text) gets the prompt up to its first mask, then tokens in reading order: each as soon as it
        and all before it are written, whatever the order of writing; then its end.
        ValueError for what cannot be done, for options that this method of writing does not have too.
        """
        refuse("generate", others)
        chosen = Choice(generation_config)
        ids = inputs if input_ids is None else input_ids
        if ids is None:
            raise ValueError("give input_ids: token ids [text, token], with masks where something is to be written")
        valid = valid_of(ids, attention_mask)
        end = chosen.end(eos_token_id, self.config.end_id)
        sampled = chosen("do_sample", do_sample, False)
        draw = chosen.draw(temperature, top_k, top_p) if sampled else Draw(temperature=0.0)
        length, new = chosen("max_length", max_length, None), chosen("max_new_tokens", max_new_tokens, None)
        if new is None and length is not None:
            new = length - ids.shape[1]
        prompts = [
            row[seen].tolist() for row, seen in zip(ids, valid, strict=True) for _ in range(num_return_sequences)
        ]
        if not prompts:
            raise ValueError("there is nothing to write: give at least one prompt, and at least 1 num_return_sequences")
        requests = [
            self._request(prompt, new, seed_of(seed, number), draw, num_steps, alpha_0)
            for number, prompt in enumerate(prompts)
        ]
        texts = self._texts(requests, streamer, end, dtype)
        left = [_left(row) for row in valid for _ in range(num_return_sequences)]
        return _table(texts, left, chosen("pad_token_id", pad_token_id, 0 if end is None else end)).to(ids.device)

    def _texts(self, requests: list[Request], streamer: Any, end: int | None, dtype: Dtype) -> list[list[int]]:
        if streamer is not None and len(requests) != 1:
            raise ValueError(f"a streamer takes one text, not {len(requests)}")
        parts = [requests[at : at + _AT_ONCE] for at in range(0, len(requests), _AT_ONCE)]
        writers = (Writer(self._prepared(dtype), self.algorithm, part, end_id=end) for part in parts)
        return [text for writer in writers for text in _written(writer, streamer, end)]

    def __getstate__(self) -> dict[str, Any]:
        """A copy, also in another process, makes a writer of its own: one points into its process's memory."""
        return {**self.__dict__, "_writer": None}

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The network draws its first weights itself; what no file holds are its angles."""
        if isinstance(module, Denoiser):
            kept = module.embed.weight
            with torch.device(kept.device):
                cos, sin = angles(module.config)
            module.cos, module.sin = cos.to(kept.dtype), sin.to(kept.dtype)

    def _loss(self, ids: Tensor, valid: Tensor, labels: Tensor, seed: int) -> Tensor:
        tokens = torch.where(labels == -100, ids, labels)
        batch = Batch(tokens=tokens, given=valid & (labels == -100), valid=valid)
        step = self.passes if self.training else 0
        self.passes += self.training
        noise = Noise(seed=seed, step=step, start=0, stop=len(ids), total=len(ids))
        terms: dict[str, tuple[Tensor, int]] = {}
        for view in self.algorithm.views(batch, noise, self.denoiser.config.mask_id):
            nats, _ = objective.of_view(self.denoiser, view.to(ids.device))
            before, count = terms.get(view.term, (torch.zeros((), device=ids.device), 0))
            terms[view.term] = before + nats, count + view.num_tokens
        return torch.stack([nats / max(1, count) for nats, count in terms.values()]).sum()

    def _look(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Logits of each row as if its token were written next, alone."""
        mask, places = self.denoiser.config.mask_id, _places(valid)
        written, rows, num = valid & (ids != mask), torch.arange(ids.shape[1], device=ids.device), ids.shape[1]
        tokens, stage, public = ids, torch.zeros_like(ids), torch.zeros_like(valid)
        real = valid
        if isinstance(self.algorithm, AR):
            first = places == 0
            tokens = ids.roll(1, 1).masked_fill(first, mask)
            stage, public = places, torch.ones_like(valid)
        elif isinstance(self.algorithm, EsoLM):
            stage = torch.where(written, places if self.algorithm.variant == "B" else 0, num + rows)
            public = written
        elif isinstance(self.algorithm, BD3LM):  # the text, then what of it later blocks read
            tokens, places = torch.cat((ids, ids), 1), torch.cat((places, places), 1)
            stage, public = places // self.algorithm.block_size, torch.cat((public, written), 1)
            real = torch.cat((valid, written), 1)
        elif bool(self.algorithm.length_multiple > 1 or self.algorithm.one_pass):
            raise ValueError(f"{type(self.algorithm).__name__} must be told who reads whom: give stage and public")
        who = relation(stage.masked_fill(~real, PADDING), public & real)
        return self.denoiser.logits(self.denoiser(tokens, places, who)[:, :num])

    def _request(
        self, ids: list[int], new: int | None, seed: int, draw: Draw, num_steps: int | None, alpha_0: float | None
    ) -> Request:
        """What is to be written in and after a prompt."""
        given = {at: token for at, token in enumerate(ids) if token != self.denoiser.config.mask_id}
        longest, holes = self.denoiser.config.length, len(given) < len(ids)
        if new is None:
            new = 0 if holes else longest - len(ids)
        if new < 0 or not len(ids) + new:
            raise ValueError(
                f"a prompt of {len(ids)} tokens with {new} new ones leaves nothing to write: raise max_length"
            )
        if len(ids) + new > longest:
            raise ValueError(
                f"{len(ids)} tokens of the prompt and {new} new ones are more than the {longest} that the network "
                "holds: lower max_new_tokens"
            )
        options: dict[str, Any] = {"num_steps": num_steps, "alpha_0": alpha_0, "draw": draw, "seed": seed}
        return Request(length=len(ids) + new, given=given, stop_at_end=not holes, **options)

    def _prepared(self, dtype: Dtype) -> Network:
        """The network that writes, made anew when a weight has changed."""
        weights = tuple((weight.data_ptr(), weight._version) for weight in self.denoiser.parameters())
        key = (dtype, self.denoiser.device, weights)
        if self._writer is None or self._writer[0] != key:
            narrow = self.denoiser.embed.weight.dtype != torch.float32
            denoiser = copy.deepcopy(self.denoiser).float() if narrow else self.denoiser
            plan = self.algorithm.plan(Request(length=self.denoiser.config.length), generator(0))
            self._writer = key, prepared(denoiser, dtype, rows=round(float(plan.rows_fed.mean())))
        return self._writer[1]


def of(model: Model) -> tuple[EsoLMForMaskedDiffusion, PreTrainedTokenizerFast]:
    """A model of ours, and its tokenizer, for the library; `save_pretrained` of both into one folder writes all."""
    config = EsoLMConfig(
        network=plain.to_plain(model.denoiser.config),
        algorithm=plain.to_plain(model.algorithm),
        step=model.facts.get("step", 0),
        end_id=model.tokenizer.end_id,
    )
    made = EsoLMForMaskedDiffusion(config)
    made.denoiser.load_state_dict(model.denoiser.state_dict())
    made.denoiser.to(model.denoiser.device)
    made.train(False)
    return made, tokenizer_of(model.tokenizer)


def tokenizer_of(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same ids. In a text given to it the mask's name is a mask, as in the library's other tokenizers."""
    backend = Backend.from_str(tokenizer.to_json())
    end = None if tokenizer.end_id is None else backend.id_to_token(tokenizer.end_id)
    mask = backend.id_to_token(tokenizer.mask_id)
    names = {"eos_token": end, "mask_token": mask, "pad_token": end or backend.id_to_token(0)}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, padding_side="left", clean_up_tokenization_spaces=False, **names
    )


def to_checkpoint(model: EsoLMForMaskedDiffusion, tokenizer: PreTrainedTokenizerFast, folder: Path | str) -> Path:
    """The way back: a checkpoint of ours in a run's folder, without an optimizer."""
    known = Tokenizer.from_json(tokenizer.backend_tokenizer.to_str())
    network = model.denoiser
    Model(network, model.algorithm, known, dtype="float32")  # ValueError if they do not belong together
    saved = checkpoint.Checkpoint(
        step=model.config.step,
        model={name: weight.float() for name, weight in network.named_parameters()},
        config={"algorithm": plain.to_plain(model.algorithm), "network": plain.to_plain(network.config)},
        tokenizer_json=known.to_json(),
        state={},
    )
    return checkpoint.save(Path(folder), saved)


def _places(valid: Tensor) -> Tensor:
    """Positions of rows in their texts, padding left out of the count."""
    return (valid.long().cumsum(1) - 1).clamp(min=0)


def _left(valid: Tensor) -> int:
    """How much padding stands in front of a text."""
    return int(valid.long().argmax()) if bool(valid.any()) else len(valid)


def _written(writer: Writer, streamer: Any, end: int | None) -> list[list[int]]:
    """Texts written to their ends; one that ended early has its end-of-text token."""
    (first, *_) = writer.requests
    known, told = dict(first.given), 0
    if streamer is not None:
        told = next((at for at in range(first.length) if at not in known), first.length)
        streamer.put(torch.tensor([[known[at] for at in range(told)]], dtype=torch.int64))
    while writer.active:
        for reveal in writer.step():
            known |= dict(zip(reveal.positions, reveal.tokens, strict=True))
        while (
            streamer is not None
            and told in known
            and not (told and first.stop_at_end and _ended(known, told, first, end))
        ):
            streamer.put(torch.tensor([known[told]]))
            told += 1
    if streamer is not None:
        streamer.end()
    texts = [(request, text.tokens.tolist()) for request, text in zip(writer.requests, writer.texts(), strict=True)]
    return [text + [end] * (len(text) < request.length and end is not None) for request, text in texts]


def _ended(known: dict[int, int], told: int, request: Request, end: int | None) -> bool:
    """Did the text end with the token before?"""
    return told - 1 not in request.given and known[told - 1] == end


def _table(texts: Sequence[list[int]], left: Sequence[int], pad: int) -> Tensor:
    """Texts as rows, padded in front as their prompts were, and behind to the longest."""
    table = torch.full((len(texts), max(n + len(text) for n, text in zip(left, texts, strict=True))), pad)
    for row, n, text in zip(table, left, texts, strict=True):
        row[n : n + len(text)] = torch.tensor(text)
    return table


AutoConfig.register(EsoLMConfig.model_type, EsoLMConfig, exist_ok=True)
AutoModel.register(EsoLMConfig, EsoLMForMaskedDiffusion, exist_ok=True)
AutoModelForMaskedLM.register(EsoLMConfig, EsoLMForMaskedDiffusion, exist_ok=True)
