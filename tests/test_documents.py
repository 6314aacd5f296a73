"""The documents are true: names exist, links lead somewhere, the code in them runs on a small model."""

import importlib
import inspect
import re
import shlex
import shutil
import tempfile
import textwrap
from pathlib import Path

import pytest

import esolm
from esolm import calibrate, cli, demo, family, prepare, recipes, train
from esolm.algorithms import AR, EsoLM
from esolm.cli import parsing
from esolm.denoiser import Config
from esolm.tokenizer import Tokenizer
from esolm.train import Run
from test_structure import FILES, LEVEL, SOURCE, module_name

ROOT = SOURCE.parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
DOCUMENTS += PAGES[1:]
NO_HARNESS = 'PAGE ON THE HARNESS NOT RUN: pip install "esolm[lm-eval]"'
RECORD = "docs/log.md"  # its programs measure: here they work once
KINDS = ("python", "sh", "yaml", "text", "json")
TESTS = (ROOT / "Makefile", ROOT / "tests/test_structure.py")
ARCHITECTURE = (ROOT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8")
WORDS = set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in [*FILES, *TESTS])))
TEXT = "ROMEO: To be, or not to be, that is the question. HAMLET: It was here when he left. " * 40

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def small(algorithm=None, vocab_size=258) -> Run:
    """A run of a second, in place of a recipe."""
    return Run(
        algorithm=algorithm or EsoLM(alpha_0=0.5),
        network=Config(vocab_size=vocab_size, length=96, width=32, layers=1, heads=2),
        num_steps=2,
        batch_size=4,
        validation_texts=2,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with what the documents' examples name: texts, pairs, a tokenizer and runs."""
    place = tmp_path_factory.mktemp("documents")
    (place / "books").mkdir()
    for name in ("books/one.txt", "books/two.txt", "held-out.txt"):
        (place / name).write_text(TEXT)
    rows = [f'{{"question": "{n} and {n}?", "prompt": "{n} and {n}?", "answer": "{2 * n}"}}' for n in range(40)]
    (place / "qa.jsonl").write_text("\n".join(rows))
    shutil.copy(ROOT / "tests/reference/a.esolm.lightning.ckpt", place / "last.ckpt")
    source = prepare.Source(data=str(place / "books"))
    text = prepare.prepare(source, place / "tokens", vocab_size=258)
    options = {"tokenizer": text.tokenizer, "validation": text.validation(96), "origin": source.origin()}
    for name, method in (("runs/first", None), ("out/demo/run", None), ("runs/ar", AR())):
        train.train(small(method), place / name, data=text.training(96), **options)
    for run in ("first", "ar"):  # where `esolm train` keeps them
        shutil.copytree(place / "tokens", place / "runs" / run, dirs_exist_ok=True)
    (place / "texts.jsonl").write_text('{"text": "It was here."}\n')
    return place


@pytest.fixture
def there(place, monkeypatch):
    """In that folder, with recipes and a tokenizer that take no time."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(Tokenizer, "train", staticmethod(lambda texts, vocab_size: Tokenizer.bytes()))
    for recipe in ("demo", "shakespeare", "lm1b", "owt"):
        monkeypatch.setattr(recipes, recipe, small)


def fences(text: str, kind: str) -> list[str]:
    return [code for _, found, code in all_blocks(text) if found == kind]


def run_blocks(text: str, kind: str) -> list[str]:
    """The fenced blocks of a kind, but for those that a page says are not run, and why."""
    return [code for mark, found, code in all_blocks(text) if found == kind and not mark]


def all_blocks(text: str) -> list[tuple[str, str, str]]:
    """Of each fenced block of a page: the comment that says that it is not run, its kind, its content."""
    found = re.findall(r"^(<!-- not run: \S.* -->\n\n?)?^(`{3,})(.*)\n((?s:.*?))^\2$", text, re.MULTILINE)
    return [(mark, kind, code) for mark, _, kind, code in found]


@each_document
def test_relative_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [link for link in targets if "://" not in link and not (path.parent / link).exists()]
    assert not missing


@each_document
def test_every_name_in_backticks_exists(path):
    text = re.sub("^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    wrong = [name for name in re.findall(r"`([^`\n]+)`", text) if not _exists(name)]
    assert not wrong


def _exists(name: str) -> bool:
    """A path, a module, an attribute of one, or a word of the source; other code is not looked at."""
    if re.fullmatch(r"\.?[\w-]+(/[\w.-]+)*/?", name) and ("/" in name or name.endswith((".md", ".py"))):
        return (ROOT / name).exists() or any(path.match(name) for path in FILES)
    if (ROOT / name).exists():
        return True
    if re.fullmatch(r"\w+(\.\w+)*", name):
        return _resolves(name.split(".")) or all(part in WORDS for part in name.split("."))
    return True


def _resolves(parts: list[str]) -> bool:
    at = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in LEVEL), 0)
    if not at:
        return False
    found: object = importlib.import_module("esolm." + ".".join(parts[:at]))
    for part in parts[at:]:
        if part not in dir(found) and part not in inspect.get_annotations(found):  # type: ignore[arg-type]
            return False
        found = getattr(found, part, None)
    return True


def test_a_module_with_an_attribute_that_it_has_not_is_noticed():
    assert _exists("likelihood.nelbo") and _exists("sample.Writer.accept") and _exists("order.Positions.choose")
    assert not _exists("src/esolm/nothing.py") and not _exists("likelihood.nonsuch") and not _exists("nonsuch_word")


def test_the_module_map_names_every_module_in_the_order_of_the_levels():
    (block,) = fences(ARCHITECTURE.partition("## Module map")[2].partition("\n## ")[0], "text")
    lines = [re.split(r"\s{2,}", line.strip())[:-1] for line in block.splitlines() if line]
    named = []
    for first, *more in lines:
        group = first.rpartition(".")[0]
        named += [first, *(f"{group}{name}" for name in more)]
    known = {module_name(path) for path in FILES} - {"__init__", "__main__"}
    known = {name for name in known if not name.startswith("bench.")}
    assert set(named) == known
    levels = [LEVEL.get(name, 0) for name in named if name in LEVEL]
    assert levels == sorted(levels)


def test_the_five_lines_run(there, capsys):
    (lines,) = fences((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    assert len([line for line in lines.splitlines() if line]) == 5
    exec(lines, {})
    out = capsys.readouterr().out  # a prompt stays as it is, and so does what stands around a gap
    assert re.search(r'prompt="(\w+)', lines)[1] in out and "that is the question:" in out


def examples(name: str) -> tuple[list[str], str]:
    """A command's examples, and the Python call of equal power, from its help."""
    told = inspect.cleandoc(cli._COMMANDS[name].__doc__ or "").partition("\nArgs:")[0]
    before, python = told.split("In Python:\n")
    return re.findall(r"^ +(esolm .*)$", before, re.MULTILINE), textwrap.dedent(python).strip()


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_examples_of_the_help_are_understood(name):
    lines, _ = examples(name)
    assert lines
    for line in lines:
        understood(shlex.split(line, comments=True)[1:])


@each_page
def test_every_block_of_a_page_is_run_or_parsed_or_shows_something(path):
    assert not _untested(path.read_text(encoding="utf-8"))


def _untested(text: str) -> list[str]:
    """Kinds of blocks that no test looks at, and indented ones. What is between braces is made by the site's build."""
    outside = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [
        *(kind for _, kind, _ in all_blocks(text) if kind not in KINDS and kind[:1] != "{"),
        *re.findall(r"\n\n(    .*)", outside),
    ]


def test_blocks_that_nobody_runs_are_noticed():
    assert _untested("```bash\nls\n```\n") == ["bash"] and _untested("```\nls\n```\n") == [""]
    assert _untested("Do:\n\n    ls\n") == ["    ls"] and not _untested("```text\nDo:\n\n    ls\n```\n")
    marked = "```sh\nls\n```\n"
    assert not run_blocks(f"<!-- not run: it takes a day -->\n\n{marked}", "sh")
    for mark in (
        "",
        "<!-- not run: -->\n",
        "<!-- it takes a day -->\n",
        "<!-- not run: it takes a day -->\n\nBut:\n\n",
    ):
        assert run_blocks(mark + marked, "sh") == ["ls\n"]


def understood(words: list[str]) -> None:
    """A command of esolm is one that it takes; else SystemExit."""
    name, *rest = words[2:] if words[0] == "--with" else words  # a file that defines a method
    parsing.call_of(cli._COMMANDS[name], name, rest)


@each_page
def test_programs_of_a_page_run(there, path, monkeypatch):
    """One after the other, as a reader would, on a model of a second."""
    programs = run_blocks(path.read_text(encoding="utf-8"), "python")
    if path == ROOT / RECORD:
        monkeypatch.setattr(calibrate, "seconds", lambda work: (work(), 1.0)[1])
    names = {"__name__": "__page__"}
    if any("import lm_eval" in program for program in programs):
        pytest.importorskip("lm_eval", reason=NO_HARNESS)
    for number, program in enumerate(programs):
        exec(compile(program, f"{path.name}, program {number}", "exec"), names)


@pytest.mark.parametrize("name", [name for name in cli._COMMANDS if not name.startswith("bench")])
def test_the_python_call_of_a_command_runs(there, monkeypatch, name):
    """The demonstration takes minutes and the family longer: of them, only that the calls fit."""
    _, python = examples(name)
    monkeypatch.setattr(demo, "run", inspect.signature(demo.run).bind)
    monkeypatch.setattr(family, "train", inspect.signature(family.train).bind)
    exec(python, _names())


def _names() -> dict[str, object]:
    """What the calls take for granted: the names of esolm, and Path."""
    return {
        **{name: getattr(esolm, name) for name in esolm.__all__},
        "esolm": esolm,
        "Path": Path,
        "tempfile": tempfile,
    }


def test_an_order_of_ones_own_is_written_in(there):
    """The example of the architecture: a text from right to left, a token a step."""
    (code,) = fences(ARCHITECTURE, "python")
    names: dict[str, object] = {"__name__": "__page__"}
    exec(code, names)
    model = esolm.load("runs/first", dtype="float32")
    reveals = list(model.write([model.request(length=8, alpha_0=1.0, positions=names["RightToLeft"]())]))
    assert [reveal.positions for reveal in reveals] == [(place,) for place in range(7, -1, -1)]
