"""The house keeps its shape: levels of import, sizes of files and functions, and a few things that stay out.

These read the source as syntax trees, so an import inside a function counts as one.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "esolm"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# A module imports only from lines above its own.
LEVELS = (
    "types whole tables own plain noise tiles pairs pulse signals shipped native ledger kernels",
    "ranks schedule attention draw calibrate seal records pickled partial",
    "hub order cache archive parts choice",
    "denoiser",
    "products passes",
    "panels",
    "engine",
    "inference",
    "algorithms.algorithm",
    "algorithms.ar algorithms.bd3lm algorithms.esolm algorithms.mdlm",
    "algorithms",
    "objective",
    "feed sinks tally",
    "tokenizer corpus optim journal checkpoint folding sample likelihood quality",
    "shards watch theirs history",
    "data tokenizing importers curves",
    "guard memory inspection run",
    "model report saving state",
    "train rehearsal",
    "planning",
    "evaluate conditional transformers judge recipes texts bench.estimate bench.learning bench.steps bench.writing",
    "bench bench.headline bench.plot bench.scaling",
    "bench.growth",
    "prepare exhibits card charts",
    "demo family frontier share export",
    "__init__ cli.parsing",
    "cli.settings cli.terminal",
    "cli.importing cli.judging cli.learning cli.measuring cli.sharing cli.timing cli.watching cli.writing",
    "cli.planning",
    "cli",
    "__main__ harness",
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every absolute name that a module imports, with its line; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def ours(name: str) -> str | None:
    """The module of this package that an imported name comes from: the longest prefix that has a level."""
    parts = name.split(".")
    if parts[0] != "esolm":
        return None
    prefixes = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
    return next((prefix for prefix in prefixes if prefix in LEVEL), "__init__")


def each(paths=FILES):
    return pytest.mark.parametrize("path", paths, ids=module_name)


@each()
def test_a_module_imports_only_from_levels_above_its_own(path):
    name = module_name(path)
    assert name in LEVEL, f"{name} has no level yet: give it a line in LEVELS"
    wrong = [
        f"line {line}: {name} imports {source}"
        for imported, line in imports(TREES[path])
        if (source := ours(imported)) is not None and LEVEL[source] >= LEVEL[name]
    ]
    assert not wrong


@each()
def test_a_file_has_at_most_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@each()
def test_a_function_has_at_most_60_lines(path):
    functions = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno + 1 > 60] == []


@each()
def test_a_module_says_what_it_is(path):
    assert ast.get_docstring(TREES[path])


@each([path for path in FILES if path.parent.name != "cli"])
def test_only_the_command_line_imports_tyro(path):
    assert not [line for name, line in imports(TREES[path]) if name.split(".")[0] == "tyro"]


@each([path for path in FILES if path.stem != "ranks"])
def test_only_ranks_says_torch_distributed(path):
    named = [name for name, _ in imports(TREES[path]) if name.startswith("torch.distributed")]
    used = [ast.unparse(n) for n in ast.walk(TREES[path]) if isinstance(n, ast.Attribute)]
    assert not named
    assert "torch.distributed" not in used


@each()
def test_every_constant_that_is_read_is_there(path):
    """Names of shapes keep ruff and mypy from looking for undefined names."""
    names = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Name)]
    read = {node.id for node in names if isinstance(node.ctx, ast.Load) and re.fullmatch("_?[A-Z][A-Z0-9_]+", node.id)}
    written = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    assert not read - written - {name.rpartition(".")[2] for name, _ in imports(TREES[path])}


@each()
def test_nothing_asks_an_object_whether_it_has_an_attribute(path):
    names = [node.id for node in ast.walk(TREES[path]) if isinstance(node, ast.Name)]
    assert "hasattr" not in names


@each()
def test_nothing_is_left_unwritten(path):
    names = [node.id for node in ast.walk(TREES[path]) if isinstance(node, ast.Name)]
    assert "NotImplementedError" not in names


@each()
def test_no_file_is_named_for_what_does_not_fit_elsewhere(path):
    assert path.stem not in {"utils", "util", "common", "helpers", "helper", "base", "misc"}


@each()
def test_nothing_touches_a_global_random_generator(path):
    calls = {ast.unparse(node.func) for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)}
    seeds = {"torch.manual_seed", "torch.seed", "torch.cuda.manual_seed"}
    drawn = {c for c in calls if c.rpartition(".")[0] in ("random", "np.random", "numpy.random")}
    owned = {c for c in drawn if c.rpartition(".")[2][0].isupper() or c.endswith(".default_rng")}
    assert not calls & seeds
    assert not drawn - owned
