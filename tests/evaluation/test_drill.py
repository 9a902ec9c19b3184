"""The rows of a fault drill: each try has one end, and the table says all of them."""

import pytest

from diffusion_opt.evaluation.drill import Outcome, table


def test_ends_are_counted_and_come_back_from_json():
    ends = ["held", "refused", "held", "lost: step 3", "lost: step 3", "NaN"]
    outcome = Outcome.of("training run", "killed", ends)
    assert outcome == Outcome("training run", "killed", 6, 2, 1, 3, ("lost: step 3", "NaN"))
    assert Outcome.from_dict(outcome.as_dict()) == outcome
    with pytest.raises(ValueError, match="must add up to the tries"):
        Outcome("training run", "killed", 3, 2)


def test_the_table_has_a_row_each_and_examples_below():
    text = table([Outcome("a run", "killed", 20, 20), Outcome.of("a longer name", "cut", ["refused", "a crash"])])
    assert text.splitlines() == [
        "disturbed      how     tries  held  refused  wrong",
        "a run          killed     20    20        0      0",
        "a longer name  cut         2     0        1      1",
        "wrong, a longer name, cut: a crash",
    ]
