"""The GPU benchmark's logic on a CPU: work counted right, accuracy that can tell, tables, and the refusal."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "attention.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("attention_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def tiny(bench):
    return bench.Shape("tiny", heads=2, tokens=130, head_dim=32)


def test_flops_are_those_of_two_matrix_products(bench):
    shape = bench.Shape("s", heads=3, tokens=5, head_dim=7)
    scores = values = 2 * 3 * 5 * 5 * 7
    assert shape.flops() == scores + values
    assert shape.flops(density=0.2) == pytest.approx(0.2 * (scores + values))


def test_the_shapes_are_of_the_models_of_interest(bench):
    assert {shape.name.split()[0] for shape in bench.SHAPES} == {"FLUX.2", "LTX-2", "Wan"}
    flux = bench.SHAPES[0]
    assert (flux.heads, flux.head_dim, flux.tokens) == (48, 128, (1024 // 16) ** 2 + 512)
    wan = bench.SHAPES[-1]
    assert wan.tokens == (832 // 16) * (480 // 16) * ((81 - 1) // 4 + 1)


def test_a_random_mask_has_its_density_in_each_row_and_the_diagonal(bench):
    mask = bench.random_mask(tokens=10 * bench.BLOCK, density=0.3, device="cpu")
    assert mask.dense().sum(-1).flatten().tolist() == [3] * 10
    assert mask.density == pytest.approx(0.3)
    assert mask.dense()[0, 0].diagonal().all()


def test_every_contender_of_ours_is_measured_and_explained(bench, tiny):
    rows, left_out = bench.measure(tiny, "cpu", torch.float32, peak=0.5, rounds=2)
    named = {row.contender: row for row in rows}
    ours = {f"diffopt {name}" for name in bench.PRECISIONS}
    ours |= {f"diffopt sparse {share:g}" for share in bench.DENSITIES}
    ours |= {f"diffopt region {share:g}" for share in bench.SHARES}
    assert ours <= set(named)
    assert all(named[name].runs for name in ours)
    assert set(named) | set(left_out) >= ours | set(bench.BACKENDS) | set(bench.LIBRARIES)
    for row in rows:
        assert row.ms > 0
        assert row.tflops == pytest.approx(tiny.flops(row.density) / row.ms / 1e9)
        assert row.of_peak == pytest.approx(row.tflops / 0.5)
    errors = [named[f"diffopt {name}"].relative_l1 for name in ("dense", "int8", "nvfp4")]
    assert errors == sorted(errors)
    assert errors[0] < 1e-5 < errors[1]
    assert named["diffopt sparse 0.5"].relative_l1 < 1e-5  # against the same tiles, not against dense
    assert named["diffopt region 0.2"].relative_l1 < 1e-5
    assert named["diffopt region 0.2"].density == 0.2


def test_accuracy_sees_a_wrong_result(bench, tiny):
    q, k, v = bench.inputs(tiny, "cpu", torch.float32)
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    cosine, error = bench.accuracy(right, q, k, v, None)
    assert cosine == pytest.approx(1) and error < 1e-5
    cosine, error = bench.accuracy(right.flip(2), q, k, v, None)
    assert error > 0.1


def test_inputs_are_repeatable_and_keys_are_biased(bench, tiny):
    first, second = (bench.inputs(tiny, "cpu", torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    q, k, _ = first
    assert k.mean(2).abs().mean() > 5 * q.mean(2).abs().mean()


def test_a_contender_that_refuses_is_left_out_with_its_reason_and_a_defect_is_not_hidden(bench, tiny, monkeypatch):
    def refusing(error: Exception):
        def call(q, k, v):
            raise error

        return call

    entered = [
        bench.Contender("other", refusing(RuntimeError("no kernel image\nmore"))),
        bench.Contender("SDPA", bench.F.scaled_dot_product_attention),
    ]
    monkeypatch.setattr(bench, "contenders", lambda shape, device: (entered, {}))
    rows, left_out = bench.measure(tiny, "cpu", torch.float32, 1.0, 1)
    assert left_out == {"other": "no kernel image"}
    assert [row.contender for row in rows] == ["SDPA"]
    entered[0] = replace(entered[0], explained=bench.explain)
    with pytest.raises(RuntimeError, match="no kernel image"):
        bench.measure(tiny, "cpu", torch.float32, 1.0, 1)


def test_libraries_have_their_own_layout(bench, tiny):
    q, k, v = bench.inputs(tiny, "cpu", torch.float32)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def sageattn(q, k, v, tensor_layout):
        assert tensor_layout == "NHD" and q.shape == (1, 130, 2, 32)
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def flash_attn_func(q, k, v):
        return sageattn(q, k, v, "NHD"), "lse"

    for call in (sageattn, flash_attn_func):
        torch.testing.assert_close(bench.foreign(call, q, k, v), want)


def test_the_table_has_a_block_for_each_shape(bench):
    row = bench.Row("A", "ours", 1.5, 300.0, 0.5, 1.0, 0.99999, 0.001)
    text = bench.shown([row, replace(row, contender="theirs"), replace(row, shape="B")])
    lines = [line for line in text.splitlines() if line]
    assert lines[0] == "A" and lines[4] == "B"
    assert lines[2].split() == ["ours", "1.500", "300.0", "0.50", "0.99999", "0.0010"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device, so it would measure")
def test_without_a_gpu_it_says_so_names_the_substitute_and_fails(bench, tmp_path, capsys):
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as stopped:
        bench.main(out)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "no CUDA device" in said and "diffusion-opt kernels report" in said
    assert not out.exists()


@pytest.mark.gpu
def test_it_runs_on_a_gpu(bench, tmp_path):
    out = tmp_path / "out.json"
    bench.main(out, rounds=2, only="audio")
    report = json.loads(out.read_text())
    assert report["machine"]["gpu"] and report["rows"] and report["peak_tflops_bf16_matmul"] > 1
