"""Shares of time: parts and kinds are told apart, nothing is counted twice, nothing is left behind."""

import time

import pytest
import torch
from torch import nn

from diffusion_opt.lesson import profiling


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x


def test_parts_get_their_own_time_and_the_rest_is_the_rest():
    model = nn.Sequential(Sleeper(0.03), Sleeper(0.01), Sleeper(0.01))
    found = profiling.seconds_by_part(lambda: model(torch.ones(2)), {"slow": [model[0]], "fast": [model[1]]}, 3)
    assert list(found) == ["slow", "fast", "rest"]
    assert found["slow"] >= 0.03 and found["fast"] >= 0.01 and found["rest"] >= 0.009
    assert found["slow"] > found["fast"]


def test_hooks_are_gone_afterwards_even_after_an_error():
    model = nn.Sequential(nn.Linear(3, 5))
    calls = iter([1, 1, None])

    def call():
        model(torch.ones(2, 3))
        if next(calls) is None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        profiling.seconds_by_part(call, {"linear": [model[0]]}, 5)
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_groups_that_contain_one_another_are_refused():
    model = nn.Sequential(nn.Linear(3, 5))
    with pytest.raises(ValueError, match="a Linear is in the groups 'all' and 'linear'"):
        profiling.seconds_by_part(lambda: None, {"all": [model], "linear": [model[0]]})


@pytest.mark.parametrize(
    "measure", [lambda n: profiling.seconds_by_part(print, {}, n), lambda n: profiling.seconds_by_operator(print, n)]
)
def test_no_repeats_are_refused(measure):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        measure(0)


def test_the_name_rest_is_taken():
    with pytest.raises(ValueError, match="'rest' is the name of what no group covers"):
        profiling.seconds_by_part(print, {"rest": []})


def test_matrix_products_dominate_where_there_is_nothing_else():
    weight = torch.randn(1500, 1500)
    found = profiling.seconds_by_operator(lambda: weight @ weight, 3)
    assert found["matrix products"] > 0.8 * sum(found.values())
    assert found["attention"] == 0


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("addmm", "matrix products"),
        ("mm", "matrix products"),
        ("linear_dynamic", "matrix products"),
        ("_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("mul", "elementwise and norms"),
        ("native_layer_norm", "elementwise and norms"),
        ("_fused_rms_norm", "elementwise and norms"),
        ("silu", "elementwise and norms"),
        ("cat", "copies and shapes"),
        ("_to_copy", "copies and shapes"),
        ("view", "copies and shapes"),
    ],
)
def test_kinds(operator, kind):
    assert profiling.kind_of(operator) == kind
