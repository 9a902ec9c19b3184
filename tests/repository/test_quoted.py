"""tools/quoted.py: the numbers that pages quote are those of their results files, and a stale one is found."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = {"steps": [{"solver": "euler", "n": 1, "fd": 30.9161}, {"solver": "a, b", "n": 1, "fd": 0.42}]}
RESULTS |= {"full": {"x.y": 0.0302, "half": 4.0}, "twice": 8, "note": "text"}


@pytest.fixture(scope="module")
def numbers():
    spec = importlib.util.spec_from_file_location("tools_quoted", ROOT / "tools" / "quoted.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path):
    """A page, its templates and a results file in a folder of their own."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "one.json").write_text(json.dumps(RESULTS))

    def made(page, *templates):
        (tmp_path / "P.md").write_text(page)
        quoted = "\n".join(f"[[quote]]\npage = 'P.md'\ntext = '''{text}'''" for text in templates)
        (tmp_path / "numbers.toml").write_text(quoted)
        return tmp_path / "numbers.toml", tmp_path

    return made


def test_every_number_that_is_quoted_is_that_of_its_results_file(numbers):
    assert numbers.update()[1] == []


def test_there_are_quotes_in_readme_and_in_a_lesson(numbers):
    pages = {quote.page for quote in numbers.quotes()}
    assert "README.md" in pages and any(page.startswith("notebooks/") for page in pages)


@pytest.mark.parametrize(
    ("way", "form", "text"),
    [
        ("steps[solver=euler; n=1].fd", ".1f", "30.9"),
        ("steps[solver=a, b].fd", ".2f~", ".42"),
        ('full."x.y"', "+.1%", "+3.0 %"),
        ("twice / full.half", ".1f", "2.0"),
    ],
)
def test_ways_and_formats(numbers, way, form, text):
    assert numbers.formatted(numbers.value_at(RESULTS, way), form) == text


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("steps[n=1].fd", "fits 2 rows"),
        ("steps[solver=heun].fd", "fits 0 rows"),
        ("full.z", "no 'z'; there are x.y, half"),
        ("note", "leads to str, not to a number"),
        ("full", "leads to dict, not to a number"),
        ("full.!", "cannot read"),
    ],
)
def test_a_way_that_leads_nowhere_says_where_it_ends(numbers, way, words):
    with pytest.raises(numbers.QuoteError, match=words):
        numbers.value_at(RESULTS, way)


def test_a_stale_number_is_found_and_replaced_and_the_rest_of_the_page_stays(numbers, repository):
    where = repository("An FD of\n12.0 there, 12.0 here.\n", "FD of {one: steps[solver=euler].fd | .1f} there,")
    pages, changes = numbers.update(*where)
    assert pages == {"P.md": "An FD of\n30.9 there, 12.0 here.\n"}
    assert len(changes) == 1 and changes[0].startswith("P.md: 12.0 is 30.9 now")


def test_several_numbers_in_one_sentence_keep_their_places(numbers, repository):
    template = '| a | {one: steps[solver=a, b].fd | .2f~} | {one: full."x.y" | +.1%} | {one: twice | .0f}x |'
    pages, changes = numbers.update(*repository("| a | .40 | -1.0 % | 8x |\n", template))
    assert pages["P.md"] == "| a | .42 | +3.0 % | 8x |\n" and len(changes) == 2


@pytest.mark.parametrize("page", ["Nothing of it.", "It is 8. It is 8."])
def test_a_sentence_that_does_not_stand_there_once_is_an_error(numbers, repository, page):
    with pytest.raises(numbers.QuoteError, match="times, not once"):
        numbers.update(*repository(page, "It is {one: twice | .0f}."))


def test_results_that_do_not_exist_are_named(numbers, repository):
    with pytest.raises(numbers.QuoteError, match="no results 'two'"):
        numbers.update(*repository("It is 8.", "It is {two: twice | .0f}."))
