"""The authors' models -> our checkpoints: Eso-LM, MDLM, BD3-LM and AR, out of training files and published folders.

    a training file     what Lightning wrote with torch.save: raw and averaged weights, settings, tokenizer
    a published folder  safetensors (or pytorch_model.bin) and config.json: one set of weights

    file -> archive (tensors, plain data) -> theirs (method, sizes, tokenizer) -> folding (our weights) -> checkpoint

Nothing that a file names is imported or called. What it does not say is asked for, never guessed; what is left out is
told.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from esolm import checkpoint, hub, plain, seal, theirs
from esolm.algorithms import AR, Algorithm
from esolm.archive import Archive, ArchiveError, Stored, open_archive
from esolm.checkpoint import Checkpoint, CheckpointError
from esolm.denoiser import Config
from esolm.folding import averaged, from_authors, with_mask_last
from esolm.pickled import Inert
from esolm.theirs import Settings, TokenizerObject
from esolm.tokenizer import Tokenizer

__all__ = ["Imported", "Weights", "from_authors", "import_model"]

Weights = Literal["raw", "ema"]
_PREFIXES = ("backbone.", "_orig_mod.", "module.", "model.backbone.")
_SETTINGS_LIMIT = 2**24


@dataclass(frozen=True, eq=False, kw_only=True)
class Imported:
    """What an import made: where it is, and what was found in the file, as labels and values to print."""

    path: Path
    algorithm: Algorithm
    network: Config
    told: dict[str, str]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Found:
    """What a file or folder holds, before anything is converted."""

    kind: str
    tensors: dict[str, Tensor]
    weights: str
    settings: Settings
    algorithm: Algorithm | None
    tokenizer: TokenizerObject
    tokenizer_json: str | None
    dropped: list[str]
    step: int = 0
    start_of_text: str | None = None  # what stands in front of a text, for an autoregressive network


def import_model(
    path: str | Path,
    out: str | Path,
    *,
    weights: Weights | None = None,
    tokenizer: str | Path | None = None,
    algorithm: Algorithm | None = None,
    length: int | None = None,
) -> Imported:
    """Convert a training file or a published folder of the authors (or its name on the Hub) into a checkpoint in `out`.

    `weights`: the averaged ones (`ema`) or those of the last step (`raw`); None takes the averaged ones where there are
    any. `tokenizer`: its file or folder (see `Tokenizer.load`), where the file holds none. `algorithm` and `length` are
    for files that do not say. CheckpointError for a file that is damaged or of another kind; ValueError for what does
    not fit together.
    """
    path, out = Path(path), Path(out)
    if hub.is_name(path):
        path = _of_the_hub(str(path))
    if out.is_dir() and any(checkpoint.is_step(one) for one in out.iterdir()):
        raise ValueError(f"{out} already holds a run: choose another folder")
    if not path.exists():
        raise CheckpointError(f"there is no {path}: give a training file, or a folder as it was published")
    try:
        found = _folder(path, weights) if path.is_dir() else _training_file(path, weights)
    except ArchiveError as problem:
        raise CheckpointError(str(problem)) from None
    except (OSError, SafetensorError, ValueError) as problem:
        raise CheckpointError(f"cannot import {path}: {problem}") from None
    try:
        return _converted(found, path, out, tokenizer, _method(found, algorithm), _length(found, length))
    except CheckpointError:
        raise
    except ValueError as problem:
        raise ValueError(f"cannot import {path}: {problem}") from None


def _of_the_hub(name: str) -> Path:
    try:
        return hub.published(name)
    except hub.HubError as problem:
        raise CheckpointError(str(problem)) from None


# -- what there is -----------------------------------------------------------------------------------------


def _training_file(path: Path, weights: Weights | None) -> _Found:
    archive = open_archive(path)
    root = archive.root
    state = root.get("state_dict") if isinstance(root, dict) else None
    if not isinstance(state, dict):
        raise ValueError("it is no training file: it has no state_dict")
    raw, others = _backbone(state)
    average = root.get("ema")
    shadow = average.get("shadow_params") if isinstance(average, dict) else None
    if weights == "ema" and not isinstance(shadow, list):
        raise ValueError("it holds no averaged weights (ema): take those of the last step, --weights raw")
    take = isinstance(shadow, list) and weights != "raw"
    chosen = {**raw, **averaged(raw, shadow)} if take else raw  # type: ignore[arg-type]
    _refuse_other_shapes(raw, chosen)
    options = root.get("hyper_parameters")
    options = options.entries if isinstance(options, Inert) else options if isinstance(options, dict) else {}
    settings = Settings.of(options.get("config", options))
    tokenizer = TokenizerObject(options.get("tokenizer"))
    dropped = [*_unused(root, take=take, averages=isinstance(shadow, list)), *others, *_objects(archive)]
    step = root.get("global_step")
    return _Found(
        kind=f"training file, Lightning {str(root.get('pytorch-lightning_version', 'unknown'))[:20]}",
        tensors={name: archive.tensor(one) for name, one in chosen.items()},
        weights="averaged (ema)" if take else "raw" if weights else "raw (the file holds no averaged ones)",
        settings=settings,
        algorithm=theirs.algorithm_of(settings),
        tokenizer=tokenizer,
        tokenizer_json=tokenizer.json(),
        dropped=dropped,
        step=step if type(step) is int and 0 <= step < 10**12 else 0,
        start_of_text=theirs.start_of_text(settings),
    )


def _folder(path: Path, weights: Weights | None) -> _Found:
    """What is published in a folder. ValueError where it is not the authors'."""
    if weights is not None:
        raise ValueError("a published folder holds one set of weights: leave out --weights")
    if not (path / "config.json").is_file():
        raise ValueError("it is a folder without config.json: give a training file, or a folder as it was published")
    settings = Settings.of(plain.parse(seal.text(path / "config.json", limit=_SETTINGS_LIMIT)))
    algorithm = theirs.published_algorithm(settings)
    tensors, others = _backbone(_published(path))
    files = [path / name for name in ("tokenizer.json", "vocab.json", "vocab.bpe")]
    own = next((file for file in files if file.is_file()), None)
    return _Found(
        kind=f"published folder, {settings.get('model_type')}",
        tensors={name: one for name, one in tensors.items() if isinstance(one, Tensor)},
        weights="as published",
        settings=settings,
        algorithm=algorithm,
        tokenizer=TokenizerObject(None),
        tokenizer_json=None if own is None else Tokenizer.load(own).to_json(),
        dropped=others,
        start_of_text="none",
    )


def _published(path: Path) -> dict[str, Any]:
    """The tensors of a folder, by name: one file, or several with an index."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = plain.parse(seal.text(index, limit=_SETTINGS_LIMIT))
        files = names.get("weight_map") if isinstance(names, dict) else None
        if not isinstance(files, dict) or not all(isinstance(file, str) and _is_name(file) for file in files.values()):
            raise ValueError(f"{index.name} maps no names of tensors to files of this folder")
        shards = {file: load_file(path / file) for file in sorted(set(files.values()))}
        missing = [name for name, file in files.items() if name not in shards[file]]
        if missing:
            raise ValueError(f"{files[missing[0]]} has no tensor {missing[0]!r}, which {index.name} says")
        return {name: shards[file][name] for name, file in files.items()}
    if (path / "model.safetensors").is_file():
        return dict(load_file(path / "model.safetensors"))
    if (path / "pytorch_model.bin").is_file():
        archive = open_archive(path / "pytorch_model.bin")
        state = archive.root if isinstance(archive.root, dict) else {}
        return {name: archive.tensor(one) for name, one in state.items() if isinstance(one, Stored)}
    raise ValueError("there are no weights in it: model.safetensors, its shards with an index, or pytorch_model.bin")


def _is_name(file: str) -> bool:
    return Path(file).name == file and file.endswith(".safetensors")


def _backbone(state: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """The tensors of the network, without the prefix of their names, and the names of the others."""
    network, others = {}, []
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Stored | Tensor):
            continue
        short = name
        while prefix := next((one for one in _PREFIXES if short.startswith(one)), ""):
            short = short.removeprefix(prefix)
        inside = short != name or short.startswith(("blocks.", "vocab_embed.", "output_layer.", "sigma_map.", "rotary"))
        if short in network:
            raise ValueError(f"it has two tensors {short[:60]!r}, with different prefixes")
        if inside:
            network[short] = tensor
        else:
            others.append(name[:60])
    return network, others


def _refuse_other_shapes(raw: Mapping[str, Stored], chosen: Mapping[str, Any]) -> None:
    for name, one in chosen.items():
        if not isinstance(one, Stored) or one.shape != raw[name].shape:
            raise ValueError(f"the averaged weights are not in the order of the parameters: {name} has another shape")


def _unused(root: Mapping[str, Any], *, take: bool, averages: bool) -> list[str]:
    """What a training file holds for going on with its run."""
    told = ["the raw weights" if take else "the averaged weights"] if averages else []
    names = {"optimizer_states": "the optimizer", "lr_schedulers": "its schedule", "callbacks": "callbacks"}
    told += [name for key, name in names.items() if root.get(key)]
    return [*told, *(name for key, name in (("loops", "loops"), ("sampler", "the sampler")) if key in root)]


def _objects(archive: Archive) -> list[str]:
    kinds = sorted(name.rpartition(".")[2] for name in archive.inert)
    return (
        [f"objects ({', '.join(kinds[:8])}{', ...' if len(kinds) > 8 else ''}), of which only values were read"]
        if kinds
        else []
    )


# -- what it becomes ---------------------------------------------------------------------------------------


def _method(found: _Found, given: Algorithm | None) -> Algorithm:
    said = found.algorithm
    if said is None and given is None:
        raise ValueError("it does not say its method: name it with --model (and --alpha-0, or --block-size)")
    if said is None or given is None:
        return said or given  # type: ignore[return-value]
    same = {key: value for key, value in plain.to_plain(said).items() if key not in ("batch_split", "low_variance")}
    if same.items() - plain.to_plain(given).items():
        raise ValueError(f"it holds {said}, not {given}: leave out --model")
    return said


def _length(found: _Found, given: int | None) -> int:
    said = found.settings.whole("model.length", "model_length")
    if given is not None and said not in (None, given):
        raise ValueError(f"its network was trained on texts of {said} tokens, not {given}: leave out --length")
    if (length := said or given) is None:
        raise ValueError("it does not say how long its texts are: give --length")
    return length


def _converted(
    found: _Found, path: Path, out: Path, tokenizer: str | Path | None, algorithm: Algorithm, length: int
) -> Imported:
    heads = found.settings.whole("model.n_heads", "n_heads")
    network, weights = from_authors(found.tensors, length, heads)
    text = found.tokenizer_json if tokenizer is None else Tokenizer.load(tokenizer).to_json()
    name, notes = found.tokenizer.special("mask_token"), []
    mask_id = found.settings.get("mask_index") if name is None or text is None else theirs.id_of(text, name)
    if type(mask_id) not in (int, type(None)) or not 0 <= (mask_id or 0) < network.vocab_size:
        raise ValueError(
            f"mask_index must be one of the {network.vocab_size:,} ids, the file says {str(mask_id)[:40]!r}"
        )
    if mask_id is not None and mask_id < network.mask_id:
        network, weights = with_mask_last(network, weights, mask_id)
        notes.append(f"the mask, id {mask_id} in the file, is now the last one")
    known = _tokenizer(found, text, network.vocab_size)
    if found.settings.get("algo.ignore_bos") is True and not isinstance(algorithm, AR):
        notes.append("it learned with the first token of a text given (ignore_bos); here it is written like the others")
    if isinstance(algorithm, AR):
        notes += _start(found, known, weights)
    algorithm.check(network)
    told = {
        "found": found.kind,
        "method": repr(algorithm),
        "network": f"{network.layers} layers, width {network.width}, {network.heads} heads, length {length}",
        "weights": f"{found.weights}, step {found.step:,}" if found.step else found.weights,
        "tokenizer": _described(found, tokenizer, known, text),
        "changed": "; ".join(["time conditioning folded into norms and matrices"] * network.norm_bias + notes)
        or "nothing",
        "dropped": "; ".join(found.dropped) or "nothing",
    }
    saved = Checkpoint(
        step=found.step,
        model=weights,
        config={"algorithm": plain.to_plain(algorithm), "network": plain.to_plain(network)},
        tokenizer_json=known.to_json(),
        state={"imported": {"from": path.name, **told}},
    )
    return Imported(path=checkpoint.save(out, saved), algorithm=algorithm, network=network, told=told)


def _tokenizer(found: _Found, text: str | None, num_ids: int) -> Tokenizer:
    if text is None:
        return Tokenizer.from_json(theirs.numbered(num_ids))
    return Tokenizer.from_json(theirs.fitted(text, num_ids, end=found.tokenizer.special("eos_token")))


def _described(found: _Found, given: str | Path | None, known: Tokenizer, text: str | None) -> str:
    named = found.settings.get("data.tokenizer_name_or_path")
    which = "of the file" if given is None else str(given)
    if text is None:
        asked = f" (the file names {str(named)[:40]!r})" if named else ""
        which = f"none{asked}: ids are written as numbers until you import again with --tokenizer FILE"
    end = "" if known.end_id is not None or text is None else ", without end-of-text"
    return f"{which}, {known.vocab_size:,} ids with the mask{end}"


def _start(found: _Found, known: Tokenizer, weights: dict[str, Tensor]) -> list[str]:
    """Our autoregressive network reads the mask in front of a text. One that learned with another token there gets that
    token's row for its mask, which it reads nowhere else."""
    if found.start_of_text == "mask":
        return []
    if found.start_of_text is None:
        return ["in front of a text stands the mask (the file does not say what its network learned with)"]
    name = found.tokenizer.special("bos_token")
    place = known.end_id if name is None else theirs.id_of(known.to_json(), name)
    if place is None:
        raise ValueError("it learned with a first token (bos_token) that its tokenizer does not have: give --tokenizer")
    embed = weights["embed.weight"].clone()
    embed[-1] = embed[place]
    weights["embed.weight"] = embed
    return [f"in front of a text, where the file has id {place}, stands the mask with the same meaning"]
