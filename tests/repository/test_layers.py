"""Rules of the house that the import contract (`make layers`) cannot express: read off the syntax of each module."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "diffusion_opt"
MODULES = sorted(PACKAGE.rglob("*.py"))
OWN_CODE = [*MODULES, *sorted((ROOT / "tools").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
MOST_LINES = 400
IMPORT_BUDGET_S = 0.3


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def top_level_imports(body: list[ast.stmt]) -> Iterator[str]:
    """Names of modules imported when a module is: not those inside functions or under `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from top_level_imports([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            handlers = [statement for handler in node.handlers for statement in handler.body]
            yield from top_level_imports([*node.body, *handlers, *node.orelse, *node.finalbody])
        elif isinstance(node, ast.ClassDef | ast.With):
            yield from top_level_imports(node.body)


def test_top_level_imports_sees_what_runs_at_import():
    source = (
        "import a\nif x:\n    from b.c import d\ntry:\n    import e\nexcept ImportError:\n    import f\n"
        "if TYPE_CHECKING:\n    import no\ndef g():\n    import no\nclass H:\n    import i\n"
    )
    assert list(top_level_imports(ast.parse(source).body)) == ["a", "b.c", "e", "f", "i"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_lessons_import_plotting_and_widgets_at_module_level(path):
    drawn = {name for name in top_level_imports(ast.parse(path.read_text(encoding="utf-8")).body)}
    found = {name for name in drawn if name.partition(".")[0] in ("matplotlib", "ipywidgets")}
    assert not found or "lesson" in path.relative_to(PACKAGE).parts, f"import {sorted(found)} where it is drawn with"


@pytest.mark.parametrize("path", OWN_CODE, ids=name_of)
def test_each_module_is_short_explains_itself_and_catches_by_name(path):
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert len(source.splitlines()) <= MOST_LINES, f"more than {MOST_LINES} lines: split it by concept"
    assert not tree.body or ast.get_docstring(tree), "a module opens with what it is and why"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            passes_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None  # a rollback
            assert passes_on or caught not in ("", "Exception", "BaseException"), f"line {node.lineno} hides any error"


def test_no_module_is_named_after_nothing():
    vague = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert not [name_of(path) for path in ROOT.glob("[!.]*/**/*.py") if path.name in vague]


def test_each_room_has_tests():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    tested = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert rooms <= tested, f"rooms without tests: {sorted(rooms - tested)}"


def test_import_is_fast_and_loads_nothing_heavy():
    program = (
        "import json, sys, time\n"
        "began = time.process_time()\n"
        "import diffusion_opt\n"
        "print(json.dumps([time.process_time() - began, sorted({name.partition('.')[0] for name in sys.modules})]))"
    )
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    heavy = {"torch", "diffusers", "modelopt", "torchmetrics", "matplotlib", "ipywidgets", "triton", "tyro"}
    assert not heavy & set(runs[0][1])
    assert min(seconds for seconds, _ in runs) < IMPORT_BUDGET_S
