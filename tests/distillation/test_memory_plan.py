"""The memory of a run before anything is loaded: published sizes, and adapters and shards counted as they are."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel, LTX2VideoTransformer3DModel, ModelMixin, WanTransformer3DModel
from small_transformers import small_transformer

from diffusion_opt.distillation.memory_plan import Sizes, memory_plan, transformer_of
from diffusion_opt.distillation.plan import StudentPlan
from diffusion_opt.training import memory

KLEIN = {
    "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 7680, "axes_dims_rope": (32, 32, 32, 32), "guidance_embeds": False,
}  # fmt: skip
WAN = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960}
SMALL = Sizes(height=64, width=64, num_frames=9, processes=2)


def plan_of(rank: int | None, method: str = "dmd2") -> StudentPlan:
    return StudentPlan("a pipeline", method, 4, lora_rank=rank)


def rows(text: str) -> dict[str, list[float]]:
    """Numbers of a table by the name of the row."""
    lines = [line.rsplit(maxsplit=7) for line in text.splitlines()[2:] if not line.startswith("without")]
    return {name.strip(): [float(value) for value in values] for name, *values in lines}


@pytest.mark.parametrize(
    ("kind", "config", "sizes", "billions"),
    [
        (Flux2Transformer2DModel, KLEIN, Sizes(), 3.88),
        pytest.param(WanTransformer3DModel, WAN, Sizes(480, 832, 81), 1.42, marks=pytest.mark.slow),
        pytest.param(LTX2VideoTransformer3DModel, {}, Sizes(512, 768, 121), 18.88, marks=pytest.mark.slow),
    ],
)
def test_published_sizes(kind: type[ModelMixin], config: dict, sizes: Sizes, billions: float) -> None:
    with torch.device("meta"):
        transformer = kind(**config).to(torch.bfloat16)
    needs = rows(memory_plan(transformer, plan_of(64), sizes))
    assert needs["teacher (base)"][0] * memory.GIBIBYTE / 2e9 == pytest.approx(billions, abs=0.02)
    assert 0 < needs["one micro-batch"][5] < 60
    assert needs["sum"][6] > needs["teacher (base)"][0]


def meta(family: str) -> ModelMixin:
    return small_transformer(family).to("meta", torch.bfloat16)


def test_adapters_count_the_base_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GIBIBYTE", 1)
    transformer = meta("wan")
    held = [*transformer.parameters(), *transformer.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in held)
    linear = [module for module in transformer.modules() if isinstance(module, torch.nn.Linear)]
    adapter = 4 * 3 * sum(module.in_features + module.out_features for module in linear)
    needs = rows(memory_plan(transformer, plan_of(3), SMALL))
    assert needs["teacher (base)"][0] == weights
    assert needs["student"][:4] == [adapter, adapter, 2 * adapter + 4 * 2 * len(linear), adapter]
    assert needs["fake_score"][:4] == [adapter, adapter, 2 * adapter + 4 * 2 * len(linear), 0]
    assert needs["sum"][6] == sum(row[6] for name, row in needs.items() if name != "sum")
    assert "fake_score" not in rows(memory_plan(meta("wan"), plan_of(3, "ode"), SMALL))


def test_whole_networks_fall_with_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GIBIBYTE", 1)
    one, eight = (
        rows(memory_plan(meta("ltx2"), plan_of(None), Sizes(64, 96, 17, 1, n, shard=True, shard_teacher=True)))
        for n in (1, 8)
    )
    for name in ("student", "fake_score", "teacher (base)"):
        assert one[name][0] / 8 <= eight[name][0] < one[name][0] / 4
    assert eight["one micro-batch"] == one["one micro-batch"]


def test_other_families_are_planned_without_a_pass() -> None:
    said = memory_plan(meta("sd3"), plan_of(4), SMALL)
    assert "not estimated for this family" in said and "one micro-batch" not in said


def test_a_folder_is_planned_from_its_configuration(tmp_path: Path) -> None:
    transformer = small_transformer("wan")
    transformer.save_config(tmp_path / "transformer")
    found = transformer_of(tmp_path)
    assert next(found.parameters()).is_meta and type(found) is type(transformer)
    with pytest.raises(ValueError, match="has 0 transformers"):
        transformer_of(tmp_path / "nowhere")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text()) | {"_class_name": "NoSuchModel"}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="of class 'NoSuchModel', which diffusers does not have"):
        transformer_of(tmp_path)
