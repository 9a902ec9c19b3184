"""Allocation: the optimum of every small problem by enumeration, budgets kept, and compared as measured."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization.pipelines import generate, small_pipeline

from diffusion_opt.quantization import PTQ
from diffusion_opt.quantization.mixed.allocation import Allocation, allocate, compare_with_uniform, frontier, uniform
from diffusion_opt.quantization.mixed.sensitivity import (
    FLOAT,
    LayerSensitivity,
    SensitivityTable,
    joint_error,
    record_probe,
    sensitivity,
)

FORMATS = ("nvfp4", "mxfp8", "int8")
SHAPES = ((32, 16), (16, 64), (48, 48), (16, 16))


def table(errors: list[tuple[float, ...]], times: int = 1) -> SensitivityTable:
    """A table of made-up layers; `errors` in the order of FORMATS."""
    layers = tuple(
        LayerSensitivity(
            f"layer{number}",
            (f"layer{number}",),
            (SHAPES[number % len(SHAPES)],),
            100 + 7 * number,
            {format: (error,) * times for format, error in zip(FORMATS, row, strict=True)},
        )
        for number, row in enumerate(errors)
    )
    return SensitivityTable("0" * 16, FORMATS, (1.0,) * times, 4, layers)


def enumerated(one: SensitivityTable, options: tuple[str, ...], measure: str, limit: float) -> float:
    """The least predicted error within the limit, by trying everything."""
    found = math.inf
    for choice in itertools.product(options, repeat=len(one.layers)):
        if sum(getattr(layer, measure)(format) for layer, format in zip(one.layers, choice, strict=True)) <= limit:
            named = {layer.name: format for layer, format in zip(one.layers, choice, strict=True)}
            found = min(found, one.predicted(named))
    return found


errors = st.lists(st.tuples(*[st.floats(0.001, 1)] * 3), min_size=1, max_size=3)
few = settings(max_examples=20, deadline=None)


@few
@given(errors, st.floats(4.6, 34), st.booleans())
def test_the_choice_is_the_optimum(rows, bits, keep_float):
    one = table(rows)
    options = (*FORMATS, *((FLOAT,) if keep_float else ()))
    limit = bits * sum(layer.num_weights for layer in one.layers)
    best = enumerated(one, options, "weight_bits", limit)
    if best == math.inf:
        with pytest.raises(ValueError, match="is too little"):
            allocate(one, bits_per_weight=bits, keep_float=keep_float)
        return
    found = allocate(one, bits_per_weight=bits, keep_float=keep_float)
    assert found.predicted_error == pytest.approx(best)
    assert found.weight_bits <= limit and found.bits_per_weight == found.weight_bits / found.num_weights
    assert found.weight_bits == sum(layer.weight_bits(found.formats[layer.name]) for layer in one.layers)
    assert (FLOAT in found.formats.values()) <= keep_float and FLOAT not in found.layers.values()


@few
@given(errors, st.floats(0.1, 1.2))
def test_bit_operations_are_a_budget_too(rows, share):
    one = table(rows)
    limit = int(share * uniform(one, "int8").bit_operations)
    best = enumerated(one, FORMATS, "bit_operations", limit)
    if best < math.inf:
        found = allocate(one, max_bit_operations=limit, keep_float=False)
        assert found.predicted_error == pytest.approx(best) and found.bit_operations <= limit


@few
@given(errors)
def test_the_frontier_falls_and_holds_every_optimum(rows):
    one = table(rows)
    front = frontier(one)
    assert [a.weight_bits for a in front] == sorted({a.weight_bits for a in front})
    assert all(a.predicted_error >= b.predicted_error for a, b in itertools.pairwise(front))
    assert front[-1].predicted_error == 0 and set(front[-1].formats.values()) == {FLOAT}
    for format in FORMATS:
        plain = uniform(one, format)
        assert allocate(one, max_bytes=plain.weight_bytes).predicted_error <= plain.predicted_error * (1 + 1e-12)
    found = front[len(front) // 2]
    assert allocate(one, max_bytes=found.weight_bytes).predicted_error == pytest.approx(found.predicted_error)


def test_what_is_sensitive_keeps_its_bits():
    one = table([(0.01, 0.001, 0.0005), (0.9, 0.1, 0.05), (0.01, 0.001, 0.0005)])
    found = allocate(one, bits_per_weight=7, keep_float=False)
    assert found.formats["layer1"] == "int8" and found.formats["layer2"] == "nvfp4"
    assert str(found).startswith("2 in int8, 1 in nvfp4: 6.31 bits per weight, 3,028 bytes, predicted error 0.05")
    assert found.weight_bytes == math.ceil(found.weight_bits / 8)


def test_budgets_that_make_no_sense_are_refused():
    one = table([(0.3, 0.2, 0.1)])
    with pytest.raises(ValueError, match="exactly one of bits_per_weight, max_bytes, max_bit_operations, got none"):
        allocate(one)
    with pytest.raises(ValueError, match="got bits_per_weight, max_bytes"):
        allocate(one, bits_per_weight=4, max_bytes=9)
    with pytest.raises(ValueError, match=r"bits_per_weight=4 is too little: the smallest choice needs 4\.5625"):
        allocate(one, bits_per_weight=4)
    with pytest.raises(ValueError, match="the table has nvfp4, mxfp8, int8, not 'fp8'"):
        allocate(one, bits_per_weight=9, formats=("fp8",))
    with pytest.raises(ValueError, match="no format to choose from"):
        allocate(one, bits_per_weight=9, formats=())


@pytest.fixture(scope="module")
def measured() -> tuple:
    """A small pipeline, its table, and a probe that the table has not seen."""
    pipe = small_pipeline()
    seen, unseen = (record_probe(pipe, 2, torch.Generator().manual_seed(seed), num_times=2) for seed in (0, 1))
    return pipe, sensitivity(pipe, seen, ("nvfp4", "int8")), unseen


def test_the_contest_measures_both_at_the_same_size(measured):
    pipe, one, probe = measured
    contest = compare_with_uniform(pipe, one, probe, at=("int8",))[0]
    assert contest.mixed.weight_bits <= contest.uniform.weight_bits
    assert contest.uniform_error == pytest.approx(joint_error(pipe.transformer, contest.uniform.formats, probe))
    assert contest.mixed_error == pytest.approx(joint_error(pipe.transformer, contest.mixed.formats, probe))
    assert contest.mixed_error < 2 * contest.uniform_error
    assert f"int8 everywhere: {contest.uniform.bits_per_weight:.2f} bits, error" in str(contest)
    with pytest.raises(ValueError, match="this table is of model 0000000000000000"):
        compare_with_uniform(pipe, table([(0.3, 0.2, 0.1)]), probe)


def test_an_allocation_is_a_technique(measured):
    pipe, one, _ = measured
    found = allocate(one, bits_per_weight=12)
    assert isinstance(found, Allocation) and len(set(found.formats.values())) > 1
    exact = generate(pipe)
    technique = PTQ(layers=found.layers, samples=2)
    assert not torch.equal(generate(technique.apply(pipe)), exact)
    technique.remove(pipe)
    assert torch.equal(generate(pipe), exact)
