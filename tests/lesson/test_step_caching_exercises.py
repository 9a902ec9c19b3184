"""Exercises of lesson 05: each typical mistake gets its hint, and the checks agree with the package."""

import pytest
import torch

from diffusion_opt.caching.step.predictors import Anchor, Extrapolation
from diffusion_opt.flow import sampling_times
from diffusion_opt.lesson import checks
from diffusion_opt.lesson.checks import WrongAnswerError
from diffusion_opt.lesson.solutions.step_caching import computed_steps, forecast


def rule(adds_up=True, after=lambda total, change, threshold: 0.0, forced=True, first=True):
    """TeaCache's rule with a slip."""

    def decide(changes, threshold):
        mask, total = [True] * first, 0.0
        for change in changes:
            total = total + change if adds_up else change
            mask.append(total >= threshold)
            if mask[-1]:
                total = after(total, change, threshold)
        mask[-1] = mask[-1] or forced
        return mask

    return decide


def line(formula):
    """A forecast from a formula of the last two values and their times."""

    def forecast(kept, t):
        if len(kept) == 1:
            return kept[0][1]
        (s, old), (r, new) = kept[-2:]
        return formula(old, new, s, r, t)

    return forecast


MISTAKES = [
    ("ex_05_1", lambda times, mask: times[:-1][mask], "the end is missing"),
    ("ex_05_1", lambda times, mask: times, "the grid that the cache walks on"),
    ("ex_05_1", lambda times, mask: torch.cat([times[:-1][~mask], times[-1:]]), "that were skipped"),
    ("ex_05_1", lambda times, mask: torch.cat([times[:1], times[1:][mask]]), r"looks at times\[i\]"),
    ("ex_05_1", lambda times, mask: sampling_times(3), "these are even times"),
    ("ex_05_1", lambda times, mask: times[:-2], r"the shape must be \(4,\)"),
    ("ex_05_1", lambda times, mask: times[:4] * 0, "off by up to"),
    ("ex_05_2", line(lambda old, new, s, r, t: new), "this is reuse"),
    ("ex_05_2", line(lambda old, new, s, r, t: 2 * new - old), "counts computed steps"),
    ("ex_05_2", line(lambda old, new, s, r, t: new - (new - old) * (t - r) / (r - s)), "the sign"),
    ("ex_05_2", line(lambda old, new, s, r, t: new + (new - old) * (r - s) / (t - r)), "upside down"),
    ("ex_05_2", line(lambda old, new, s, r, t: old + (new - old) * (t - r) / (r - s)), "from the newer"),
    ("ex_05_2", line(lambda old, new, s, r, t: new + (new - old) * (t - r)), "division is missing"),
    ("ex_05_2", lambda kept, t: forecast(kept[:2], t), "two oldest"),
    ("ex_05_2", lambda kept, t: forecast([kept[0], kept[-1]], t), "skips the value between"),
    ("ex_05_2", lambda kept, t: kept[0][1] * 3, "off by up to"),
    ("ex_05_2", lambda kept, t: forecast(kept, t) if len(kept) > 1 else kept[0][1] * 0, "no line: reuse it"),
    ("ex_05_3", lambda changes, threshold: [not one for one in computed_steps(changes, threshold)], "other way round"),
    ("ex_05_3", rule(forced=False), "the last step is always computed"),
    ("ex_05_3", rule(adds_up=False), "compared alone"),
    ("ex_05_3", rule(after=lambda total, change, threshold: total), "never set back"),
    ("ex_05_3", rule(after=lambda total, change, threshold: total - threshold), "do not take the threshold off"),
    ("ex_05_3", rule(after=lambda total, change, threshold: change), "not to that change"),
    ("ex_05_3", rule(first=False), "11 steps, .* got 10"),
    ("ex_05_3", lambda changes, threshold: 7, "got int"),
    ("ex_05_3", lambda changes, threshold: [True] * 11, "off by up to"),
]


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(("name", "wrong", "hint"), MISTAKES)
def test_a_typical_mistake_gets_its_hint(name, wrong, hint, capsys):
    with pytest.raises(WrongAnswerError, match=hint):
        getattr(checks, name)(wrong)
    assert capsys.readouterr().out == ""


def test_the_forecast_is_the_package_s_straight_line():
    kept = [(time, torch.randn(3, 2, dtype=torch.float64)) for time in (0.9, 0.7, 0.4)]
    anchors = [Anchor(time, {"v": value}) for time, value in kept]
    torch.testing.assert_close(forecast(kept, 0.1), Extrapolation(1).predict(anchors, 0.1)["v"])


def test_decisions_may_come_as_a_tuple_or_a_tensor(capsys):
    for form in (tuple, torch.tensor):
        checks.ex_05_3(lambda changes, threshold, form=form: form(computed_steps(changes, threshold)))
    assert capsys.readouterr().out.count("correct: ") == 2
