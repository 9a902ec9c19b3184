"""Results of benchmarks as lessons read them."""

import pytest

from diffusion_opt.lesson import published as room
from diffusion_opt.lesson.published import published


def test_results_are_read_by_name():
    assert published("steps-fashion")["model"] == "fashion"


def test_results_that_are_not_there_are_named_beside_those_that_are(tmp_path, monkeypatch):
    (tmp_path / "one.json").write_text("{}")
    monkeypatch.setattr(room, "RESULTS", tmp_path)
    assert published("one") == {}
    with pytest.raises(FileNotFoundError, match=r"no results 'two' .* there are one\."):
        published("two")
