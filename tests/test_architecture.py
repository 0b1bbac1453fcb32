"""The rooms and the arrows between them (docs/architecture.md), read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

import pilotfish

ROOT = Path(pilotfish.__file__).parent
#: room -> the rooms it may import, besides itself
ARROWS = {
    "protocol": set[str](),
    "demo": set[str](),
    "cache": {"protocol"},
    "edge_agent": {"cache", "protocol"},
    "cloud_worker": {"cache", "protocol"},
    "cli": {"bench", "demo", "edge_agent", "cloud_worker", "cache", "protocol"},
    "bench": {"cli", "demo", "edge_agent", "cloud_worker", "cache", "protocol"},
}
DEFAULT_MODELS = "demo.pair"  # paths of the demo pair: all that the two sides may know of the demo
#: heavy library -> the only modules whose import may load it
OWNERS = {
    "llama_cpp": ["cache.llama_context"],
    "vllm": ["cloud_worker.engines.vllm_runner", "cloud_worker.engines.vllm_scheduler"],
    "matplotlib": [],  # only in functions of bench.ablation.plots
    "starlette": ["edge_agent.http.*"],
    "uvicorn": ["protocol.http_server"],
    "huggingface_hub": [],  # only in functions of cache.hub_*
    "torch": ["cloud_worker.engines.torch_sampling", "cloud_worker.engines.vllm_*", "demo.*"],
}
FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}  # reading them runs what a stranger wrote


def module_files() -> dict[str, Path]:
    """Every module of ours by its name below `pilotfish`: "protocol.keys"."""
    found = {}
    for room in ARROWS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = module_files()


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imported(node: ast.AST) -> list[str]:
    """Names an import statement may load: `from a import b` is both `a` and `a.b`. Relative ones are not used here."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute here"
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def all_imports(module: str) -> set[str]:
    return {name for node in ast.walk(tree(module)) for name in imported(node)}


def imports_at_load(module: str) -> set[str]:
    """What importing the module itself imports: nothing in functions, nothing under TYPE_CHECKING."""

    def walk(nodes: list[ast.stmt]) -> Iterator[str]:
        for node in nodes:
            yield from imported(node)
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for field in ("orelse", "finalbody") if typing_only else ("body", "orelse", "finalbody"):
                yield from walk(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from walk(handler.body)

    return set(walk(tree(module).body))


def ours(names: set[str]) -> set[str]:
    """The modules of ours among imported names."""
    below = {name.removeprefix("pilotfish.") for name in names if name.startswith("pilotfish.")}
    return below & MODULES.keys()


@cache
def loads(module: str) -> frozenset[str]:
    """Top-level names of every library that importing the module loads, through modules of ours too."""
    seen, todo, libraries = set[str](), [module], set[str]()
    while todo:
        if (current := todo.pop()) not in seen:
            seen.add(current)
            names = imports_at_load(current)
            libraries |= {name.partition(".")[0] for name in names}
            parts = current.split(".")
            todo += [
                *ours(names),
                *(package for i in range(1, len(parts)) if (package := ".".join(parts[:i])) in MODULES),
            ]
    return frozenset(libraries)


def docstrings(module: ast.Module) -> set[int]:
    """Ids of the constants that are docstrings or stand-alone texts."""
    return {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_one_way(module: str) -> None:
    room = module.partition(".")[0]
    names = ours(all_imports(module))
    if room in ("edge_agent", "cloud_worker") and DEFAULT_MODELS in names:
        names -= {DEFAULT_MODELS, "demo"}
    rooms = {name.partition(".")[0] for name in names}
    assert rooms <= ARROWS[room] | {room}, f"{module} may not import {rooms - ARROWS[room] - {room}}"


def test_the_two_sides_never_meet() -> None:
    assert "cloud_worker" not in ARROWS["edge_agent"]
    assert "edge_agent" not in ARROWS["cloud_worker"]


@pytest.mark.parametrize("library", OWNERS)
def test_heavy_libraries_load_only_with_the_modules_that_own_them(library: str) -> None:
    heavy = {module for module in MODULES if library in loads(module)}
    stray = {module for module in heavy if not any(fnmatch(module, owner) for owner in OWNERS[library])}
    assert not stray, f"importing these loads {library}; import it where it is used: {sorted(stray)}"


def light() -> list[str]:
    """Modules that load nothing heavy by what their source says."""
    return [module for module in MODULES if not loads(module) & {*OWNERS, "tokenizers"}]


def in_a_fresh_python(code: str) -> None:
    """Run code where nothing is loaded yet; a failure shows its last line."""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr.strip().splitlines()[-1]


def test_importing_them_really_loads_nothing_heavy() -> None:
    names = [f"pilotfish.{module}" for module in light() if not module.endswith("__main__")]
    in_a_fresh_python(f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    assert not (loaded := {{*{[*OWNERS]}}} & set(sys.modules)), f"{{name}} loads {{loaded}}"
""")


def test_the_command_line_starts_with_nothing_heavy() -> None:
    in_a_fresh_python("""
import pilotfish.cli.main, sys
assert not (loaded := {"vllm", "torch", "llama_cpp", "matplotlib", "numpy"} & set(sys.modules)), loaded
""")


@pytest.mark.parametrize("module", MODULES)
def test_redis_keys_are_spelled_on_one_page(module: str) -> None:
    if module == "protocol.keys":
        return
    prose = docstrings(tree(module))
    texts = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Constant) and id(node) not in prose]
    spelled = [node.value for node in texts if "pf:" in str(node.value)]
    assert not spelled, f"{module} spells Redis keys; use protocol/keys.py: {spelled}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_read_that_could_run_code(module: str) -> None:
    assert not {name.partition(".")[0] for name in all_imports(module)} & FORBIDDEN


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(tree(module))


def test_tests_are_collected_by_path() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py")), "importlib mode: a package here would shadow a room"
