"""Sensitivity: each entry is the error of PTQ on that layer alone, the pipeline stays as it was, tables round-trip."""

import json
import math

import pytest
import torch
from quantization.pipelines import anatomy, generate, small_pipeline

from diffusion_opt.evaluation import count
from diffusion_opt.quantization import choose
from diffusion_opt.quantization.mixed.sensitivity import (
    FLOAT,
    LayerSensitivity,
    SensitivityTable,
    errors_by_time,
    joint_error,
    record_probe,
    sensitivity,
)

FORMATS = ("int8", "w4a4", "nvfp4_svdquant")


@pytest.fixture(scope="module")
def measured() -> tuple:
    pipe = small_pipeline(default_steps=4)
    probe = record_probe(pipe, 3, torch.Generator().manual_seed(0), num_times=3)
    return pipe, probe, sensitivity(pipe, probe, FORMATS)


def test_the_probe_holds_passes_of_the_float_network(measured):
    pipe, probe, table = measured
    assert tuple(probe) == table.times and list(probe) == sorted(probe, reverse=True) and max(probe) == 1
    assert len(probe) == 3 and errors_by_time(pipe.transformer, probe) == (0.0, 0.0, 0.0)
    assert table.num_points == sum(len(points) for points in probe.values()) == 9
    every = record_probe(pipe, 1, torch.Generator().manual_seed(0), num_times=50)
    assert len(every) == 4  # no more than it visits


def test_every_chosen_layer_has_an_error_in_every_format(measured):
    pipe, _, table = measured
    assert [layer.name for layer in table.layers] == [c.name for c in choose(pipe.transformer) if c.quantized]
    for layer in table.layers:
        assert set(layer.errors) == set(FORMATS) and all(len(errors) == 3 for errors in layer.errors.values())
        assert all(math.isfinite(e) and e > 0 for errors in layer.errors.values() for e in errors)
        assert layer.error(FLOAT) == 0
    assert all(layer.error("w4a4") > layer.error("int8") for layer in table.layers)


def test_an_entry_is_the_error_of_that_layer_alone(measured):
    pipe, probe, table = measured
    for layer in (table.layers[0], table.layers[-1]):
        for format in ("int8", "w4a4"):
            assert layer.error(format) == pytest.approx(joint_error(pipe.transformer, {layer.name: format}, probe))


def test_squares_nearly_add(measured):
    pipe, probe, table = measured
    names = [layer.name for layer in table.layers]
    for format in ("int8", "w4a4"):
        everywhere = dict.fromkeys(names, format)
        assert joint_error(pipe.transformer, everywhere, probe) == pytest.approx(table.predicted(everywhere), rel=0.6)
    assert joint_error(pipe.transformer, dict.fromkeys(names, FLOAT), probe) == 0
    mixed = dict(zip(names, ("int8", "w4a4", "nvfp4_svdquant", FLOAT) * 4, strict=True))
    assert 0 < joint_error(pipe.transformer, mixed, probe) < table.predicted(dict.fromkeys(names, "w4a4")) * 1.6


def test_the_pipeline_is_left_alone():
    pipe = small_pipeline()
    exact, before = generate(pipe), anatomy(pipe.transformer)
    probe = record_probe(pipe, 1, torch.Generator().manual_seed(0), num_times=1)
    sensitivity(pipe, probe, ("int8",), groups={"one": ["transformer_blocks.0.attn.to_q"]})
    assert anatomy(pipe.transformer) == before and torch.equal(generate(pipe), exact)


def test_groups_get_one_format_together(measured):
    pipe, probe, table = measured
    names = [layer.name for layer in table.layers]
    blocks = {"double": [n for n in names if n.startswith("transf")], "single": [n for n in names if n[0] == "s"]}
    grouped = sensitivity(pipe, probe, ("int8",), groups=blocks)
    double = grouped.layers[0]
    assert double.layers == tuple(blocks["double"]) and len(double.shapes) == len(blocks["double"])
    ours = dict.fromkeys(blocks["double"], "int8")
    assert double.error("int8") == pytest.approx(joint_error(pipe.transformer, ours, probe))
    assert sum(layer.macs for layer in grouped.layers) == sum(layer.macs for layer in table.layers)
    with pytest.raises(ValueError, match="each of them once, got 2 with 1 names"):
        sensitivity(pipe, probe, ("int8",), groups={"a": names[:1], "b": names[:1]})


def test_costs_are_those_of_the_formats(measured):
    pipe, probe, table = measured
    layer = next(one for one in table.layers if one.name == "single_transformer_blocks.0.attn.to_out")
    (outputs, inputs), = layer.shapes  # fmt: skip
    assert layer.num_weights == outputs * inputs
    assert layer.weight_bits("int8") == 8 * outputs * inputs + 32 * outputs
    assert layer.weight_bits(FLOAT) == 32 * outputs * inputs
    assert layer.bit_operations("int8") == 64 * layer.macs and layer.bit_operations(FLOAT) == 1024 * layer.macs
    points = next(iter(probe.values()))[:1]
    cost = count(lambda: pipe.transformer(**points.arguments))
    assert sum(one.macs for one in table.layers) < cost.macs


def test_dominant_layers_carry_the_share():
    def layer(name: str, error: float) -> LayerSensitivity:
        return LayerSensitivity(name, (name,), ((2, 2),), 4, {"int8": (error, error)})

    table = SensitivityTable("x", ("int8",), (1.0, 0.5), 2, (layer("a", 1), layer("b", 3), layer("c", 2)))
    assert table.dominant("int8", 9 / 14) == ("b",)
    assert table.dominant("int8", 0.7) == ("b", "c")
    assert table.dominant("int8", 1) == ("b", "c", "a")
    assert table.predicted(dict.fromkeys("abc", "int8")) == pytest.approx(math.sqrt(14))
    assert "half of the squared error in int8: b" in str(table)
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\], got 0"):
        table.dominant("int8", 0)
    with pytest.raises(ValueError, match="has int8, not 'fp8'"):
        table.dominant("fp8")


def test_tables_round_trip_and_refuse_other_files(measured, tmp_path):
    table = measured[2]
    table.save(tmp_path / "table.json")
    assert SensitivityTable.load(tmp_path / "table.json") == table
    stored = json.loads((tmp_path / "table.json").read_text())
    del stored["layers"][3]["macs"]
    (tmp_path / "table.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"table.json is no sensitivity table: LayerSensitivity has exactly"):
        SensitivityTable.load(tmp_path / "table.json")


def test_wrong_wishes_are_refused(measured):
    pipe, probe, _ = measured
    with pytest.raises(ValueError, match="format must be one of"):
        sensitivity(pipe, probe, ("int9",))
    with pytest.raises(ValueError, match="num_samples and num_times must be 1 or more, got 0 and 5"):
        record_probe(pipe, 0, torch.Generator())
