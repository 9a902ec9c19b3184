"""tools/docs.py: pages of the course, of names and of results; docs/talk.md names what exists."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from diffusion_opt.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def api():
    return loaded("docs_api")


@pytest.fixture(scope="module")
def results():
    return loaded("docs_results")


@pytest.fixture(scope="module")
def docs(api, results):
    return loaded("docs")


@pytest.fixture
def package(tmp_path):
    """A package with one room: a function, a dataclass and a value, imported from two files."""
    room = tmp_path / "pack" / "room"
    room.mkdir(parents=True)
    (tmp_path / "pack" / "__init__.py").write_text("")
    (room / "__init__.py").write_text(
        '"""What the room is for."""\n\nfrom pack.room.parts import LIMIT, Part\n'
        "from pack.room.parts import work as do\n"
        'from outside import other\n\n__all__ = ["LIMIT", "Part", "do", "other"]\n'
    )
    (room / "parts.py").write_text(
        "from dataclasses import dataclass\n\nLIMIT = 3\n\n\n@dataclass(frozen=True)\nclass Part:\n"
        '    """A part, with a_name and `code_too`."""\n\n    size: int = 2  # bytes\n\n    @property\n'
        "    def large(self) -> bool:\n        return True\n\n    def _hidden(self):\n        pass\n\n\n"
        'def work(\n    x: int,\n) -> int:\n    """Does it.\n\n        x = 1\n\n    Well.\n    """\n    return x\n'
    )
    return tmp_path / "pack"


def test_public_names_are_read_from_the_source(api, package):
    page = api.api_pages(package)["api/room.md"]
    assert page.startswith("# pack.room\n\n## pack.room\n\nWhat the room is for.")
    assert "### LIMIT\n\n```python\nLIMIT = 3\n```" in page
    assert "@dataclass(frozen=True)\nclass Part:\n    size: int = 2  # bytes\n\n    @property\n" in page
    assert "def large(self) -> bool: ..." in page and "_hidden" not in page
    assert "A part, with a\\_name and `code_too`." in page
    assert (
        "### do\n\n```python\ndef work(\n    x: int,\n) -> int:\n```\n\nDoes it.\n\n```text\nx = 1\n```\n\nWell."
        in page
    )
    assert "In `pack/room/parts.py`." in page
    assert "### other" not in page, "what the package does not define is not its page"


def test_every_room_with_public_names_has_a_page(api):
    pages = api.api_pages(ROOT / "diffusion_opt")
    assert {"api/flow.md", "api/caching.md", "api/quantization.md", "api/recipes.md"} <= set(pages)
    assert "### euler" in pages["api/flow.md"] and "### TeaCache" in pages["api/caching.md"]


def test_a_results_page_has_the_machine_single_values_and_tables(results):
    data = {
        "machine": {"cpu": "C", "threads": 2, "gpu": None, "versions": {"torch": "2"}},
        "samples": 500,
        "rows": [{"name": "a|b", "error": 0.123456}, {"name": "c", "time": 2}],
        "deep": {"one": {"x": 1.0}, "two": {"x": 2.0}},
        "empty": [],
    }
    page = results.result_page("r", data)
    assert page.startswith("# r\n\nFrom `benchmarks/results/r.json`.\n\nMachine: C, 2 threads, GPU: none; torch 2.")
    assert "- samples: 500" in page
    assert "| name | error | time |\n|---|---|---|\n| a\\|b | 0.1235 |  |\n| c |  | 2 |" in page
    assert "## deep\n\n| name | x |\n|---|---|\n| one | 1 |\n| two | 2 |" in page


def test_a_long_table_says_what_it_leaves_out(results):
    assert results.table([{"x": i} for i in range(203)]).endswith("3 more rows are in the file.")


def test_links_to_pages_stay_and_others_become_names(docs):
    pages = {"docs/a.md", "README.md"}
    text = (
        "[a](docs/a.md#part) [w](https://example.org) [LICENSE](LICENSE) [code](diffusion_opt/x.py) ![p](p.png) [h](#h)"
    )
    linked = docs.linked(text, "README.md", pages)
    assert "[a](docs/a.md#part) [w](https://example.org) LICENSE code (`diffusion_opt/x.py`)" in linked
    assert linked.endswith("![p](p.png) [h](#h)")


def test_a_card_without_a_title_gets_one(docs):
    assert docs.titled("text", "data/models/x/README.md") == "# x\n\ntext"
    assert docs.titled("# X\n", "README.md") == "# X\n"


def test_all_pages_are_in_the_tree_of_the_first_one(docs, tmp_path):
    pages = docs.write_sources(tmp_path)
    index = (tmp_path / "index.md").read_text()
    assert not [page for page in pages if re.sub(r"\.(md|ipynb)$", "", page) not in index.splitlines()]
    assert all((tmp_path / page).is_file() for page in pages)
    assert sum(page.startswith("notebooks/") for page in pages) == len(list((ROOT / "notebooks").glob("*.ipynb")))
    assert sum(page.startswith("results/") for page in pages) == len(list((ROOT / "benchmarks/results").glob("*.json")))


def test_commands_and_tests_that_the_page_of_topics_names_exist():
    text = (ROOT / "docs" / "talk.md").read_text()
    commands = re.findall(r"`diffusion-opt ([a-z]+(?: [a-z]+)?)", text)
    known = {*COMMANDS, *(name.split()[0] for name in COMMANDS)}
    assert len(commands) > 10
    assert not [command for command in commands if command not in known and command.split()[0] not in COMMANDS]
    places = re.findall(r"`(tests/[\w/.]+)`", text)
    assert len(places) > 10 and not [place for place in places if not (ROOT / place).exists()]
    lessons = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {f"{n:02d}" for n in range(1, 13)} <= {name[:2] for name in lessons if f"notebooks/{name}" in text}


@pytest.mark.slow
def test_sphinx_builds_all_pages_without_a_warning(docs, tmp_path):
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    docs.write_sources(tmp_path / "source")
    assert docs.build(tmp_path) == 0
    page = (tmp_path / "html" / "notebooks" / "00_start_here.html").read_text()
    assert "_static/mathjax/" in page and not re.search(r'<(script|link)[^>]+(src|href)="https?:', page)
