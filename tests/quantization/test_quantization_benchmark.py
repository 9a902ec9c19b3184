"""The benchmark's own arithmetic: sizes, paired changes, and what its cells are."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from quantization.pipelines import small_pipeline

from diffusion_opt.evaluation import frechet_distance, load_reference, moments
from diffusion_opt.quantization import FORMATS, PTQ, LowPrecisionAttention

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "quantization.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quantization_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_every_format_has_a_cell_before_and_after_training(bench):
    cells = list(bench.cells())
    assert len(set(cells)) == len(cells)
    student = {(name, training) for model, name, training in cells if model == "fashion-4step"}
    names = {*bench.LINEARS, bench.EVERYWHERE, *(f"attention-{name}" for name in bench.ATTENTIONS)}
    assert student == {(name, training) for name in names for training in ("ptq", "qat")}
    assert set(bench.LINEARS) <= set(FORMATS)


def test_names_are_techniques(bench):
    transformer = small_pipeline().transformer
    assert bench.technique_of("w4a4", transformer) == PTQ("w4a4")
    assert bench.technique_of("attention-fp8", transformer) == LowPrecisionAttention("fp8")
    everywhere = bench.technique_of(bench.EVERYWHERE, transformer).formats(transformer)
    linears = {name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    assert everywhere.keys() == linears and everywhere["proj_out"] == FORMATS["int4_weight_only"]
    assert everywhere["transformer_blocks.0.attn.to_q"] == FORMATS["nvfp4"]


def test_a_change_of_nothing_is_nothing_and_a_change_is_that_of_the_distances(bench):
    reference = load_reference("fashion")
    labels = torch.arange(200) % 10
    features = reference.first(200) + 0.3
    assert bench.paired_change(features, features, labels) == (0.0, 0.0, 0.0)
    moved = features + 0.1
    change, low, high = bench.paired_change(moved, features, labels)
    mine, theirs = (frechet_distance(*moments(x), reference.mean, reference.cov) for x in (moved, features))
    assert change == pytest.approx(float(mine / theirs - 1), rel=1e-6)
    assert low < change < high and high - low < change  # the noise of 200 samples is shared


def test_sizes_are_those_of_packed_weights(bench):
    pipe = small_pipeline()
    technique = PTQ("int8")
    layers = [pipe.transformer.get_submodule(name) for name in technique.formats(pipe.transformer)]
    weights = sum(layer.weight.numel() for layer in layers)
    channels = sum(layer.out_features for layer in layers)
    row = bench.size(pipe, technique)
    assert row["quantized_bytes"] == weights + 4 * channels
    parameters = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    assert row["weight_bytes"] == row["quantized_bytes"] + 2 * (parameters - weights)
    assert row["layers_ratio"] == pytest.approx(4 * weights / row["quantized_bytes"])
    assert "bits" not in bench.size(pipe, LowPrecisionAttention())
