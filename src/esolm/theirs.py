"""What the authors' files say of a model: the method, its sizes and its tokenizer, out of settings as they left them.

    training file    hyper_parameters: omegaconf objects (read as pickled.Inert) and a tokenizer object
    published folder config.json

Keys are those of the public code of Eso-LM, MDLM and BD3-LM. A key that is not there is unknown (None), never guessed;
a value that our networks cannot express is an error. It reads no file and no tensor.
"""

import re
from collections.abc import Mapping
from typing import Any

from esolm import plain
from esolm.algorithms import AR, BD3LM, MDLM, Algorithm, EsoLM
from esolm.pickled import Inert, Latin
from esolm.tokenizer import END, KNOWN_ENDS, MASK

_DEPTH, _VALUES = 32, 200_000  # of settings: an object may hold itself
_METHODS = "ar, mdlm, esolm, bd3lm"
_WORD_PIECE = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
_PARTS = (
    "BertNormalizer BertPreTokenizer ByteFallback ByteLevel Digits Fuse Lowercase Metaspace NFC NFD NFKC NFKD Prepend "
    "Punctuation Replace Sequence Split Strip StripAccents Whitespace WhitespaceSplit WordPiece"
)  # of a tokenizer: what GPT-2, BERT, Llama and their kin have


class Settings:
    """Nested settings, asked for by dotted keys; `${a.b}` is the value of another key."""

    def __init__(self, values: object) -> None:
        self._values = values if isinstance(values, Mapping) else {}

    @staticmethod
    def of(config: object) -> "Settings":
        """The values of an omegaconf object, or of any other that holds some."""
        return Settings(_values(config, 0, [_VALUES]))

    def get(self, *keys: str) -> Any:
        """The value of the first of some keys that there is, or None."""
        for key in keys:
            found = self._one(key, 8)
            if found is not None:
                return found
        return None

    def whole(self, *keys: str) -> int | None:
        """The same, if it is a positive whole number. ValueError if it is something else."""
        found = self.get(*keys)
        if found is not None and (type(found) is not int or not 0 < found < 2**31):
            raise ValueError(f"{keys[0]} must be a positive whole number, the file says {str(found)[:40]!r}")
        return found

    def _one(self, key: str, depth: int) -> Any:
        at: Any = self._values
        for part in key.split("."):
            at = at.get(part) if isinstance(at, Mapping) else None
        linked = re.fullmatch(r"\$\{([\w.]+)\}", at) if isinstance(at, str) else None
        return at if linked is None else self._one(linked[1], depth - 1) if depth else None


def _values(value: object, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if depth > _DEPTH or left[0] < 0:
        return None
    if isinstance(value, Inert):
        state: Any = value.state if isinstance(value.state, dict) else {}
        inside = state.get("_content", state.get("_val", value.entries or state))
        return _values(inside, depth + 1, left)
    if isinstance(value, dict):
        return {key: _values(part, depth + 1, left) for key, part in value.items() if isinstance(key, str)}
    return value if isinstance(value, str | int | float | bool | None) else None


def algorithm_of(settings: Settings) -> Algorithm | None:
    """The method of a training file; None if it does not say. ValueError for one that is not built here."""
    if settings.get("algo.time_conditioning", "time_conditioning") is True:
        raise ValueError("this network is told the time (time_conditioning), which ours is not: it cannot be imported")
    name = settings.get("algo.name")
    if name is None:  # the older code of MDLM
        kind = settings.get("parameterization")
        name = {"subs": "mdlm", "ar": "ar"}.get(kind, kind) if settings.get("backbone") != "ar" else "ar"
    low_variance = settings.get("algo.loss_type") == "low_var"
    match name:
        case None:
            return None
        case "ar":
            return AR()
        case "mdlm":
            return MDLM(low_variance=low_variance)
        case "bd3lm":
            block = settings.whole("block_size", "algo.block_size")
            return None if block is None else BD3LM(block_size=block)
        case "esolm":
            return _esolm(settings, low_variance)
    raise ValueError(f"the method {str(name)[:40]!r} is not built here; there are {_METHODS}")


def _esolm(settings: Settings, low_variance: bool) -> Algorithm | None:
    alpha_0, split = settings.get("algo.alpha_0"), settings.get("algo.batch_split")
    if alpha_0 is None:
        return None
    if isinstance(alpha_0, bool) or not isinstance(alpha_0, int | float) or not 0 <= alpha_0 <= 1:
        raise ValueError(f"algo.alpha_0 must lie in [0, 1], the file says {str(alpha_0)[:40]!r}")
    modes = {
        "diffusion": settings.get("algo.diffusion_attn_mode") if alpha_0 > 0 else None,
        "sequential": settings.get("algo.sequential_attn_mode") if alpha_0 < 1 else None,
    }
    said = {mode for mode in modes.values() if mode is not None}
    if not said:
        return None
    if said == {"bidirectional"} and alpha_0 == 1:
        return MDLM(low_variance=low_variance)
    variants = {"A" if mode in ("mixed", "mixed2") else "B" if mode == "causal" else None for mode in said}
    if len(variants) != 1 or None in variants:
        told = ", ".join(f"{part} {mode}" for part, mode in modes.items())
        raise ValueError(f"attention of this kind ({told}) is neither Eso-LM (A) nor (B)")
    share = split if isinstance(split, float) and 0 < split < 1 else EsoLM.batch_split
    variant: Any = variants.pop()
    shuffled = variant == "A" and settings.get("algo.diffusion_shuffle") is True
    options: dict[str, Any] = {"batch_split": share, "low_variance": low_variance, "shuffle_masks": shuffled}
    return EsoLM(variant=variant, alpha_0=float(alpha_0), **options)


def start_of_text(settings: Settings) -> str | None:
    """What an autoregressive network reads in front of a text: "mask", "bos", or "none" (a text begins with its
    end-of-text); None if the file does not say. The code of MDLM and BD3-LM knows "none" alone."""
    older = settings.get("algo.ignore_bos", "diffusion") is not None
    found = settings.get("algo.prepend_token") or ("none" if older else None)
    if found not in ("mask", "bos", "none", None):
        raise ValueError(f"algo.prepend_token is {str(found)[:40]!r}: mask, bos and none can be imported")
    return found


def published_algorithm(settings: Settings) -> Algorithm | None:
    """The method of a published folder, by its config.json; None for Eso-LM's, which tells neither its variant nor
    `alpha_0`. ValueError for one that is not built here."""
    if settings.get("time_conditioning") is True:
        raise ValueError("this network is told the time (time_conditioning), which ours is not: it cannot be imported")
    kind = str(settings.get("model_type")).lower()
    if kind not in ("mdlm", "bd3lm", "ar", "esolm"):
        raise ValueError(f"model_type is {kind[:40]!r} in config.json: mdlm, bd3lm and esolm can be imported")
    if kind == "esolm":
        return None
    if kind == "ar" or settings.get("causal") is True:
        return AR()
    if kind == "mdlm" or settings.get("cross_attn") is False:
        return MDLM()
    block = settings.whole("block_size")
    if block is None:
        raise ValueError("config.json has no block_size, which a BD3-LM needs")
    return BD3LM(block_size=block)


# -- tokenizers --------------------------------------------------------------------------------------------


class TokenizerObject:
    """A tokenizer object of a training file: its tokenizer.json, where it has one, and the names of special tokens."""

    def __init__(self, value: object) -> None:
        state = value.state if isinstance(value, Inert) else None
        self._state: dict[Any, Any] = state if isinstance(state, dict) else {}
        self.kind = value.name.rpartition(".")[2] if isinstance(value, Inert) else None

    def json(self) -> str | None:
        """Its tokenizer.json, also of BERT's and GPT-2's tokenizers in plain Python; None where it has no other form.
        ValueError for a damaged one, and for parts that the library was seen to fall over."""
        inner = self._state.get("_tokenizer")
        match inner.state if isinstance(inner, Inert) else None:
            case Latin(text):
                found = text.encode("latin-1", "replace").decode("utf-8", "replace")
            case bytes(data):
                found = data.decode("utf-8", "replace")
            case _:
                return self._of_python()
        parts = [_parsed(found).get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
        while parts:
            part = parts.pop()
            if isinstance(part, dict):
                if part.get("type") not in _PARTS.split():
                    raise ValueError(f"its tokenizer has a part {str(part.get('type'))[:30]!r}: give --tokenizer")
                parts += [one for inside in part.values() if isinstance(inside, list) for one in inside]
        return found

    def _of_python(self) -> str | None:
        """The same as a tokenizer.json: BERT's has its pieces in `vocab`, GPT-2's in `encoder` and `bpe_ranks`."""
        nothing: dict[str, Any] = {"version": "1.0", "added_tokens": [], "normalizer": None}
        match self._state:
            case {"vocab": dict(vocab), "wordpiece_tokenizer": _}:
                basic = self._state.get("basic_tokenizer")
                state = basic.state if isinstance(basic, Inert) and isinstance(basic.state, dict) else {}
                normal = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
                lower = state.get("do_lower_case", True) is True
                data = {
                    "normalizer": {"type": "BertNormalizer", **normal, "lowercase": lower},
                    "pre_tokenizer": {"type": "BertPreTokenizer"},
                    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
                    "model": {"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]", **_WORD_PIECE},
                }
            case {"encoder": dict(vocab), "bpe_ranks": dict(ranks)}:
                pairs = [pair for pair in ranks if isinstance(pair, tuple) and len(pair) == 2]
                spaces = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
                data = {
                    "pre_tokenizer": {"type": "ByteLevel", **spaces},
                    "decoder": {"type": "ByteLevel", **spaces},
                    "model": {"type": "BPE", "vocab": vocab, "merges": [" ".join(map(str, pair)) for pair in pairs]},
                }
            case _:
                return None
        return plain.render({**nothing, **data})

    def special(self, what: str) -> str | None:
        """The name of a special token, as in `special("mask_token")`."""
        named = self._state.get("_special_tokens_map")
        found = named.get(what) if isinstance(named, dict) and named.get(what) else self._state.get(f"_{what}")
        if isinstance(found, Inert):
            state: Any = found.state if isinstance(found.state, dict) else {}
            found = state.get("content", next(iter(found.arguments), None))
        return found if isinstance(found, str) else None


def id_of(tokenizer_json: str, name: str) -> int | None:
    """The id of a piece in a tokenizer.json."""
    data = _parsed(tokenizer_json)
    return {**_vocabulary(data), **{one["content"]: one["id"] for one in data["added_tokens"]}}.get(name)


def fitted(tokenizer_json: str, num_ids: int, *, end: str | None = None) -> str:
    """A tokenizer.json for a network of `num_ids` ids, the last of them its mask: special tokens that the network has
    no id for are left out, the mask is added, and its end-of-text gets our name where we do not know its own.

    ValueError if the tokenizer has not as many ids.
    """
    data = _parsed(tokenizer_json)
    mask = num_ids - 1
    ids = _vocabulary(data)
    added = [one for one in data["added_tokens"] if one["id"] < mask]
    for one in data["added_tokens"]:
        if one["id"] >= mask:
            ids.pop(one["content"], None)
    if max([*ids.values(), *(one["id"] for one in added)], default=-1) + 1 != mask:
        whole = {**_vocabulary(data), **{one["content"]: one["id"] for one in data["added_tokens"]}}
        count = max([-1, *(number for piece, number in whole.items() if piece != MASK)]) + 1
        raise ValueError(
            f"the network has {mask:,} ids and a mask, the tokenizer {count:,}: give the one that it was trained with"
        )
    if end is not None and end not in KNOWN_ENDS and ids.keys().isdisjoint(KNOWN_ENDS):
        for one in added:
            one["content"] = END if one["content"] == end else one["content"]
        if end in ids:
            ids[END] = ids.pop(end)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] = [*added, {"id": mask, "content": MASK, **flags}]
    if isinstance(data["model"]["vocab"], dict):
        data["model"]["vocab"] = ids
    return plain.render({**data, "post_processor": None, "truncation": None, "padding": None})


def numbered(num_ids: int) -> str:
    """A tokenizer.json that writes ids as numbers, for a network whose tokenizer is not at hand."""
    words = {"type": "WordLevel", "vocab": {str(number): number for number in range(num_ids - 1)}, "unk_token": "none"}
    nothing = dict.fromkeys(("normalizer", "decoder"))
    splits = {"type": "WhitespaceSplit"}
    data: dict[str, Any] = {"version": "1.0", "added_tokens": [], **nothing, "pre_tokenizer": splits, "model": words}
    return fitted(plain.render(data), num_ids)


def _parsed(tokenizer_json: str) -> dict[str, Any]:
    data = plain.parse(tokenizer_json)
    match data:
        case {"model": {"vocab": dict() | list()}, "added_tokens": list(added)}:
            named = all(isinstance(one, dict) and _is_piece(one.get("content"), one.get("id")) for one in added)
            if named and all(_is_piece(piece, number) for piece, number in _vocabulary(data).items()):
                return dict(data)
    raise ValueError("the tokenizer is no tokenizer.json")


def _vocabulary(data: Mapping[str, Any]) -> dict[str, int]:
    """Pieces of the model with their ids (a Unigram model has a list of pieces and scores)."""
    vocab = data["model"]["vocab"]
    pieces = vocab if isinstance(vocab, dict) else {str(part[0]): n for n, part in enumerate(vocab) if part}
    return dict(pieces)


def _is_piece(piece: object, number: object) -> bool:
    return isinstance(piece, str) and type(number) is int and 0 <= number < 2**31
