"""Make the web pages of the course in `build/docs/html`: lessons, names, results, without a network (make docs).

    python tools/docs.py               write the pages' sources to build/docs/source and build them with Sphinx
    python tools/docs.py --sources     write the sources only

The source tree mirrors the repository, so that links between README, lessons, cards and `docs/` hold as they are. A
link to a file that is no page (code, data) becomes the file's name. Three kinds of pages are generated: one for each
room of the package with its public names (`tools/docs_api.py`, read from the source without importing it), one for each
file of `benchmarks/results` (`tools/docs_results.py`), and the index. A warning of Sphinx, a broken link among them, is
an error.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from docs_api import api_pages
from docs_results import results_pages

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "docs"
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "notebooks/*.ipynb", "data/*/README.md")
PAGES += ("data/models/*/README.md", "benchmarks/README.md")
PICTURES = ("docs/pictures/*", "data/**/*.png")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")

INDEX = """# diffusion_opt

How to make diffusion models tens to hundreds of times faster, and why it works: a package and a course.

- New here? Begin with lesson [00 Start here](notebooks/00_start_here.ipynb).
- You have a pipeline and want it faster: the [README](README.md).
- You look for a topic of the talk: [topics, lessons, commands, tests](docs/talk.md).

{trees}
"""


def sources(root: Path = ROOT) -> dict[str, Path]:
    """Every page of the repository by its path from the root."""
    found = (path for pattern in PAGES for path in sorted(root.glob(pattern)))
    return {path.relative_to(root).as_posix(): path for path in found}


def linked(text: str, page: str, pages: set[str], root: Path = ROOT) -> str:
    """`text` with links to files that are no pages replaced by the files' names."""

    def one(match: re.Match) -> str:
        picture, words, target = match.groups()
        file, _, _ = target.partition("#")
        if picture or not file or re.match(r"[a-z]+:", target):
            return match[0]
        path = (root / page).parent.joinpath(file).resolve()
        name = path.relative_to(root.resolve()).as_posix() if path.is_relative_to(root.resolve()) else file
        return match[0] if name in pages else (f"{words} (`{name}`)" if words.strip("`") != name else words)

    return LINK.sub(one, text)


def tree(caption: str, entries: list[str]) -> str:
    listed = "\n".join(re.sub(r"\.(md|ipynb)$", "", entry) for entry in entries)
    return f"```{{toctree}}\n:caption: {caption}\n:maxdepth: 1\n\n{listed}\n```"


def index(pages: list[str]) -> str:
    """The first page: where to begin, and the tree of all others."""
    groups = {
        "Lessons": [page for page in pages if page.startswith("notebooks/")],
        "About": [page for page in pages if page.startswith("docs/") or "/" not in page],
        "Names": [page for page in pages if page.startswith("api/")],
        "Results": [page for page in pages if page.startswith(("results/", "benchmarks/"))],
        "Data and models": [page for page in pages if page.startswith("data/")],
    }
    return INDEX.format(trees="\n\n".join(tree(caption, entries) for caption, entries in groups.items() if entries))


def write_sources(out: Path, root: Path = ROOT) -> list[str]:
    """Write all pages and pictures to `out`; returns the pages, as paths from there."""
    found = sources(root)
    generated = {**api_pages(root / "diffusion_opt"), **results_pages(root / "benchmarks" / "results")}
    pages = {*found, *generated}
    for page, path in found.items():
        text = linked(path.read_text(encoding="utf-8"), page, pages, root)
        _write(out / page, titled(text, page))
    for page, text in generated.items():
        _write(out / page, text)
    for pattern in PICTURES:
        for picture in root.glob(pattern):
            place = out / picture.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, place)
    _write(out / "index.md", index(sorted(pages)))
    shutil.copyfile(root / "docs" / "conf.py", out / "conf.py")
    return sorted(pages)


def titled(text: str, page: str) -> str:
    """A page needs a title of the first level; a card without one gets the name of its folder."""
    if page.endswith(".ipynb") or re.search(r"^# ", text, flags=re.MULTILINE):
        return text
    return f"# {Path(page).parent.name}\n\n{text}"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def build(out: Path = OUT) -> int:
    """Sphinx's exit status; its pages lie in `out`/html."""
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-d", str(out / "doctrees")]
    return subprocess.run([*command, str(out / "source"), str(out / "html")], check=False).returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", action="store_true", help="write the sources only")
    options = parser.parse_args(arguments)
    shutil.rmtree(OUT / "source", ignore_errors=True)
    pages = write_sources(OUT / "source")
    print(f"{len(pages)} pages in {(OUT / 'source').relative_to(ROOT)}")
    if options.sources:
        return 0
    status = build()
    if status == 0:
        print(f"open {(OUT / 'html' / 'index.html').relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
