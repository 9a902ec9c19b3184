"""The script for large models, at tiny size: the same path through the code, its plan, and the sizes it believes in."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import Flux2KleinPipeline, LTX2Pipeline, WanPipeline
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
FLUX2, WAN, LTX2 = "black-forest-labs/FLUX.2-klein-base-4B", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Lightricks/LTX-2"
BILLIONS = {FLUX2: 3.88, WAN: 1.42, LTX2: 18.88}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """`distill_large.py` as a module, with its neighbor importable as when it is run."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module("distill_large")
    finally:
        sys.path.remove(str(EXAMPLES))


def rehearse(script: ModuleType, out: Path, model: str, **options: object):
    return script.distill(script.Options(model=model, dry_run=True, accumulate=2, out=out, **options))


@pytest.mark.parametrize(("model", "options"), [(FLUX2, {}), (WAN, {}), (LTX2, {}), (WAN, {"rank": 0})])
def test_two_steps_of_distribution_matching(script, tmp_path, model, options):
    result = rehearse(script, tmp_path, model, **options)
    assert (result.step, result.finished, result.images) == (2, True, 4)
    names = [sorted(row) for row in result.history]
    assert "fake_score_loss" in names[0] and "loss" in names[1]
    told = json.loads((tmp_path / "student.json").read_text())
    assert told["times"] == [1.0, 0.9, 0.75, 0.5] and told["guidance"] == 4.0
    adapter = tmp_path / "pytorch_lora_weights.safetensors"
    if options:
        assert not adapter.exists() and (tmp_path / "transformer" / "config.json").is_file()
    else:
        saved = load_file(adapter)
        assert all(name.startswith("transformer.") and ".lora_" in name for name in saved)
        assert any(value.any() for name, value in saved.items() if "lora_B" in name)


def test_two_steps_of_a_flow_map(script, tmp_path):
    result = rehearse(script, tmp_path, FLUX2, method="flow_map")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert result.finished and config["guidance_embeds"]
    with pytest.raises(ValueError, match="flow_map needs a slot for a second time, which Wan-AI"):
        rehearse(script, tmp_path / "wan", WAN, method="flow_map")


@pytest.mark.slow
def test_two_processes_rehearse_with_whole_networks_sharded(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "distill_large.py"), "--model", WAN, "--dry-run", "--rank", "0", "--accumulate", "2"]
    command += ["--shard-teacher"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "checkpoint" / "shards").glob("*.safetensors"))) == 2
    assert (tmp_path / "transformer" / "config.json").is_file()


@pytest.mark.parametrize("model", BILLIONS)
def test_published_sizes(script, model):
    with torch.device("meta"):
        transformer = script.MODELS[model].build(tiny=False)
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(BILLIONS[model], abs=0.006)


def rows(text: str) -> dict[str, list[float]]:
    """Numbers of a table by the name of the row."""
    lines = [line.rsplit(maxsplit=7) for line in text.splitlines()[2:]]
    return {name.strip(): [float(value) for value in values] for name, *values in lines}


def test_the_plan_of_adapters_counts_the_base_once(script, monkeypatch):
    monkeypatch.setattr(script.memory, "GIBIBYTE", 1)
    options = script.Options(model=FLUX2, dry_run=True, rank=3, processes=2)
    needs = rows(script.plan(options))
    with torch.device("meta"):
        transformer = script.MODELS[FLUX2].build(tiny=True)
    linear = [module for module in transformer.modules() if isinstance(module, torch.nn.Linear)]
    adapter = 4 * 3 * sum(module.in_features + module.out_features for module in linear)
    assert needs["teacher (base)"][0] == 2 * sum(p.numel() for p in transformer.parameters())
    assert needs["student"][:4] == [adapter, adapter, 2 * adapter + 4 * 2 * len(linear), adapter]
    assert needs["fake_score"][:4] == [adapter, adapter, 2 * adapter + 4 * 2 * len(linear), 0]
    assert needs["one micro-batch"][5] > 0
    assert needs["sum"][6] == sum(row[6] for name, row in needs.items() if name != "sum")


def test_the_plan_of_whole_networks_falls_with_the_processes(script, monkeypatch):
    monkeypatch.setattr(script.memory, "GIBIBYTE", 1)
    one, eight = (
        rows(script.plan(script.Options(model=WAN, dry_run=True, rank=0, processes=n, shard_teacher=True)))
        for n in (1, 8)
    )
    assert one["student"][0] == 2 * one["teacher (base)"][0]  # float32 beside bfloat16
    for name in ("student", "fake_score", "teacher (base)"):
        assert one[name][0] / 8 <= eight[name][0] < one[name][0] / 5
    assert eight["one micro-batch"] == one["one micro-batch"]


def test_text_is_encoded_by_calls_that_the_pipelines_have():
    for pipeline, arguments in (
        (Flux2KleinPipeline, {"prompt": ["a"]}),
        (WanPipeline, {"prompt": ["a"], "do_classifier_free_guidance": False}),
        (LTX2Pipeline, {"prompt": ["a"], "do_classifier_free_guidance": False}),
    ):
        inspect.signature(pipeline.encode_prompt).bind(None, **arguments)


def test_a_run_says_what_it_lacks(script, tmp_path):
    with pytest.raises(ValueError, match="give --prompts, a text file"):
        script.distill(script.Options(model=WAN, out=tmp_path))
