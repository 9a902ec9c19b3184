"""Numbers that README and lessons quote from `benchmarks/results`: checked, and rewritten when a result changes.

    python tools/quoted.py             rewrite every quoted number that differs from its file (make numbers)
    python tools/quoted.py --check     only say which ones differ, exit 1 if any does

`docs/numbers.toml` holds the sentences and table rows as templates. A hole names a results file, the way to a value in
it and a format:

    [[quote]]
    page = "README.md"
    text = "an FD of {steps-fashion: steps[solver=euler; steps=2].distance | .1f} at the same sample count"

`rows[name=x; steps=2]` takes the one row of a list whose entries have these values; a dictionary takes a key, quoted if
it has dots in it; ` / ` divides two values. Formats are Python's, and two more: `.2f~` drops a zero before the point
(.42), and a `%` comes with a blank before it (+3.0 %). A template that does not fit its page exactly once is an error,
so a sentence that was rewritten takes its template with it.
"""

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
QUOTES = ROOT / "docs" / "numbers.toml"
HOLE = re.compile(r"\{([\w-]+):\s*([^|{}]+?)\s*\|\s*([^{}]+?)\s*\}")
STEP = re.compile(r'\.?(?:"(?P<quoted>[^"]+)"|(?P<key>[\w-]+)|\[(?P<where>[^\]]+)\])')


class QuoteError(Exception):
    """A template that does not fit its page, or a way that leads to no number; the message says which."""


@dataclass(frozen=True)
class Quote:
    """One sentence of a page with holes for numbers."""

    page: str
    text: str

    def parts(self) -> Iterator[tuple[str, re.Match | None]]:
        """The text between the holes, each with the hole that follows it."""
        end = 0
        for hole in HOLE.finditer(self.text):
            yield self.text[end : hole.start()], hole
            end = hole.end()
        yield self.text[end:], None

    def pattern(self) -> re.Pattern:
        """The sentence in a page: blanks may be any white space, a hole any number."""
        pieces = []
        for literal, hole in self.parts():
            pieces.append(r"\s+".join(re.escape(word) for word in re.split(r"\s+", literal)))
            pieces.append(r"([+\-−]?[\d.,]*\d(?: ?%)?)" if hole else "")
        return re.compile("".join(pieces))


def quotes(file: Path = QUOTES) -> list[Quote]:
    return [Quote(**entry) for entry in tomllib.loads(file.read_text(encoding="utf-8"))["quote"]]


def value_at(data: Any, way: str) -> float:
    """The number that `way` leads to. Raises QuoteError, with the step that fails and what there is instead."""
    if " / " in way:
        above, below = way.split(" / ")
        return value_at(data, above) / value_at(data, below)
    at = 0
    while at < len(way):
        step = STEP.match(way, at)
        if step is None:
            raise QuoteError(f"cannot read {way[at:]!r} in {way!r}")
        data = _stepped(data, step, way)
        at = step.end()
    if not isinstance(data, int | float) or isinstance(data, bool):
        raise QuoteError(f"{way!r} leads to {type(data).__name__}, not to a number")
    return data


def _stepped(data: Any, step: re.Match, way: str) -> Any:
    if where := step["where"]:
        wanted = dict(condition.strip().split("=", 1) for condition in where.split(";"))
        rows = [row for row in data if all(str(row.get(key)) == value for key, value in wanted.items())]
        if len(rows) != 1:
            raise QuoteError(f"[{where}] in {way!r} fits {len(rows)} rows; it has to fit one")
        return rows[0]
    key = step["quoted"] or step["key"]
    if not isinstance(data, Mapping) or key not in data:
        there = ", ".join(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise QuoteError(f"{way!r} has no {key!r}; there are {there}")
    return data[key]


def formatted(value: float, form: str) -> str:
    """A number as a page shows it."""
    text = format(value, form.removesuffix("~"))
    if form.endswith("~"):
        text = re.sub(r"^([+-]?)0\.", r"\1.", text)
    return text.replace("%", " %")


def filled(quote: Quote, results: Path) -> list[str]:
    """The numbers of a quote's holes, from the files in `results`."""
    numbers = []
    for _, hole in quote.parts():
        if hole:
            file = results / f"{hole[1]}.json"
            if not file.exists():
                raise QuoteError(f"there are no results {hole[1]!r}")
            numbers.append(formatted(value_at(json.loads(file.read_text()), hole[2]), hole[3]))
    return numbers


def page_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def updated(text: str, quote: Quote, numbers: list[str]) -> tuple[str, list[str]]:
    """The page with these numbers, and what changed. Raises QuoteError unless the sentence stands there once.

    In a notebook line ends are written as backslash n between quotes; a template for one stays within a line.
    """
    found = list(quote.pattern().finditer(text))
    if len(found) != 1:
        raise QuoteError(f"{quote.page}: stands there {len(found)} times, not once: {quote.text!r}")
    changes = []
    for number, new in reversed(list(enumerate(numbers, start=1))):
        begin, end = found[0].span(number)
        if text[begin:end] != new:
            changes.append(f"{quote.page}: {text[begin:end]} is {new} now, in {quote.text!r}")
            text = text[:begin] + new + text[end:]
    return text, changes[::-1]


def update(file: Path = QUOTES, root: Path = ROOT) -> tuple[dict[str, str], list[str]]:
    """All pages that have to change with their new text, and a line for each number that differs."""
    pages: dict[str, str] = {}
    changes = []
    for quote in quotes(file):
        text = pages.get(quote.page) or page_text(root / quote.page)
        pages[quote.page], changed = updated(text, quote, filled(quote, root / "benchmarks" / "results"))
        changes += changed
    return pages, changes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say which numbers differ")
    options = parser.parse_args(arguments)
    try:
        pages, changes = update()
    except QuoteError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(changes) or "every quoted number is that of its results file")
    if options.check:
        return int(bool(changes))
    for page, text in pages.items():
        (ROOT / page).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
