"""Nothing in the repository names the machine it was made on or a package registry; its own links lead somewhere; its
prose uses plain words (`WORDS`, `RATE`)."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {".git", ".venv", "runs", "build", "dist", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
SKIPPED |= {".import_linter_cache", ".ipynb_checkpoints"}
TEXT = {
    ".py",
    ".md",
    ".toml",
    ".txt",
    ".yml",
    ".yaml",
    ".json",
    ".jsonl",
    ".ipynb",
    ".csv",
    ".html",
    ".svg",
    ".cfg",
    "",
}

# Written in two pieces, so that this file does not hold what it looks for.
MACHINE = ["/wor" + "k/", "/roo" + "t/", "/ho" + "me/", "/Us" + "ers/", "file:" + "//", "C:" + "\\"]
REGISTRY = ["index-" + "url", "find-" + "links", "pypi." + "org", "python" + "hosted", "download.py" + "torch.org"]
ALLOWED = {("tools/install.py", "download.py" + "torch.org")}  # see the comment there: nowhere else to get CPU wheels


def text_files(folder: Path = ROOT) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name in SKIPPED or path.name.endswith(".egg-info"):
            continue
        if path.is_dir():
            yield from text_files(path)
        elif path.suffix in TEXT:
            yield path


def test_no_machine_path_and_no_registry():
    found = []
    for path in text_files():
        name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        found += [f"{name}: {word}" for word in (*MACHINE, *REGISTRY) if word in text and (name, word) not in ALLOWED]
    assert not found


def markdown(path: Path) -> str:
    """The Markdown of a page or of a notebook's text cells, without code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors a reader's browser can jump to: headings as GitHub names them."""
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    text = markdown(path)
    broken = []
    for target in re.findall(r"\]\(\s*<?([^)\s>]+)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file_name, _, anchor = target.partition("#")
        other = (path.parent / file_name) if file_name else path
        pages = (".md", ".ipynb")
        if not other.exists() or (anchor and other.suffix in pages and anchor not in anchors(markdown(other))):
            broken.append(target)
    return broken


PAGES = [path for path in text_files() if path.suffix in (".md", ".ipynb")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_within_the_repository_resolve(path):
    assert not broken_links(path)


def test_the_link_check_finds_a_missing_file_and_a_missing_heading(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Some Heading!\n[a](#some-heading) [b](#other) [c](none.md) [d](https://example.org) `[e](no)`\n")
    assert broken_links(page) == ["#other", "none.md"]


# What to write in place of a word that many readers stop at. Patterns are whole words.
WORDS = {
    r"dear(er|est|ly)?": "expensive",
    r"mend(s|ed|ing)?": "repair, correct",
    r"reckon(s|ed|ing)?": "compute, count, estimate",
    r"sick(ness|er|ly)?": "failed, broken",
    r"bill(s|ed)?": "cost",
    r"shall": "is to, must",
    r"upon": "on",
    r"thus|whence|thence|henceforth|hitherto|lest|alas|naught|nought|aught|amiss": "a word of today",
    r"wherein|therein|herein|whereby|thereby|whereof|thereof|amongst|whilst": "a word of today",
}
PLAIN = re.compile("|".join(rf"\b({pattern})\b" for pattern in WORDS), re.IGNORECASE)
MEASURES = "passes|bits|bytes?|MB|GB|ms|FLOPs?|TFLOPs|MACs|evaluations|registers|micro-batches|cycles"
SHARED_BY = "weight|step|second|image|picture|rung|head|row|thread|sample|number|token|pass|channel|pixel|layer|block"
FLOWS = r"(images|pictures|frames)\s+an?\s+(second|step|rung)"
RATE = re.compile(rf"\b(({MEASURES})\s+an?\s+({SHARED_BY})|{FLOWS})\b")  # "bits a weight"; write "bits per weight"
LICENSES = {"LICENSE", "data/clips/README.md", "data/fashion-mnist/README.md"}


def prose(path: Path) -> str:
    """All that a person reads in a file: of a notebook text and code of its cells, of anything else the whole."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


def unplain(text: str) -> list[str]:
    """Words and rates in `text` that this repository does not use, each with its line and what to write instead."""
    found = []
    for match in [*PLAIN.finditer(text), *RATE.finditer(text)]:
        instead = next((new for old, new in WORDS.items() if re.fullmatch(old, match[0], re.IGNORECASE)), "per")
        found.append(f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}: write {instead!r}")
    return found


def test_plain_words_and_per_for_rates():
    files = (path for path in text_files() if path.suffix in (".py", ".md", ".ipynb") and path != Path(__file__))
    named = ((path.relative_to(ROOT).as_posix(), path) for path in files)
    found = [f"{name}, {word}" for name, path in named if name not in LICENSES for word in unplain(prose(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A dear update,\nmended.", ["line 1: 'dear': write 'expensive'", "line 2: 'mended': write 'repair, correct'"]),
        ("4.5 bits a weight", ["line 1: 'bits a weight': write 'per'"]),
        ("two passes\na step", ["line 1: 'passes\\na step': write 'per'"]),
        (
            "It takes steps a student knows; a billion; recommend; in pictures a pass; Bills of 3 GB per second",
            ["line 1: 'Bills': write 'cost'"],
        ),
    ],
)
def test_the_word_list_finds_words_and_nothing_else(text, words):
    assert unplain(text) == words
