"""Ranges of inputs against time: exact ends, percentiles of what was there, for every family and for students."""

import pytest
import torch
from quantization.pipelines import classes
from small_transformers import family_pipeline, family_sample

from diffusion_opt.quantization import RangeRecord, choose, record_ranges
from diffusion_opt.quantization.simulation import range_record
from diffusion_opt.quantization.simulation.range_record import LEVELS, LayerRanges
from diffusion_opt.subjects import Run

SETTINGS = {"run": classes(batch_size=3, num_inference_steps=3, guidance_scale=2.0), "samples": 6}
NAME = "transformer_blocks.0.ff.linear_out"


def test_the_record_holds_what_went_through_a_layer(pipe):
    inputs, times = [], []
    layer = pipe.transformer.get_submodule(NAME)
    handles = [
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten())),
        pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: times.append(float(kwargs["timestep"][0])), with_kwargs=True
        ),
    ]
    record = record_ranges(pipe, **SETTINGS)
    for handle in handles:
        handle.remove()
    found = record.layers[NAME]
    assert list(record.layers) == [choice.name for choice in choose(pipe.transformer) if choice.quantized]
    assert found.times == tuple(sorted(set(times), reverse=True))
    for index, time in enumerate(found.times):
        seen = torch.cat([x for x, t in zip(inputs, times, strict=True) if t == time])
        assert (found.smallest[index], found.largest[index]) == (float(seen.min()), float(seen.max()))
        assert found.sizes[index] == float(seen.abs().max())
        exact = torch.quantile(seen, torch.tensor(LEVELS) / 100)
        spread = float(seen.std())
        for mine, theirs in zip(found.percentiles[index][1:4], exact.tolist()[1:4], strict=True):
            assert mine == pytest.approx(theirs, abs=0.5 * spread)
        assert list(found.percentiles[index]) == sorted(found.percentiles[index])


def test_small_layers_are_kept_whole_so_percentiles_are_exact(pipe, monkeypatch):
    monkeypatch.setattr(range_record, "SAMPLES", 10**9)
    inputs = []
    layer = pipe.transformer.get_submodule(NAME)
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten()))
    record = record_ranges(pipe, [NAME], classes(num_inference_steps=1, guidance_scale=2.0), samples=3)
    handle.remove()
    exact = torch.quantile(torch.cat(inputs), torch.tensor(LEVELS) / 100)
    assert record.layers[NAME].percentiles == (tuple(exact.tolist()),)


def test_nothing_is_left_behind_and_saving_keeps_all(pipe, tmp_path):
    record = record_ranges(pipe, [NAME], **SETTINGS)
    hooks = [module for module in pipe.transformer.modules() if module._forward_pre_hooks]
    assert hooks == []
    record.save(tmp_path / "ranges.json")
    assert RangeRecord.load(tmp_path / "ranges.json") == record


def test_drift_is_the_widest_over_the_narrowest():
    ranges = LayerRanges((1.0, 0.5), (-4.0, -1.0), (2.0, 0.5), ((0.0,) * 5,) * 2)
    assert ranges.sizes == (4.0, 1.0)
    assert ranges.drift == 4.0


@pytest.mark.parametrize("family", ["ltx2", "wan", "sd3"])
def test_every_family_tells_its_times(family, monkeypatch):
    pipe = family_pipeline(family, blocks=2)
    monkeypatch.setattr(range_record, "run_trajectories", lambda pipe, *_: family_sample(pipe, steps=3))
    record = record_ranges(pipe, run=Run(("unused",)))
    for layer in record.layers.values():
        assert len(layer.times) == 3 and layer.times[0] == pytest.approx(1, abs=2e-3)
        assert all(low < high for low, high in zip(layer.smallest, layer.largest, strict=True))


def test_a_student_has_its_own_times(shipped):
    pipe = shipped("fashion-4step")
    assert len(record_ranges(pipe, [NAME], samples=10).layers[NAME].times) == 4


def test_layers_that_do_not_exist_are_named(pipe):
    with pytest.raises(ValueError, match="'nowhere' is no linear layer"):
        record_ranges(pipe, ["nowhere"])
