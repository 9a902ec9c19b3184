"""Timings take turns; bytes are counted once and all of them."""

import time

import pytest
import torch
from torch import nn

from diffusion_opt.evaluation import Timing, interleaved, peak_memory, weight_bytes


def test_candidates_take_turns() -> None:
    order = []
    timings = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, min_turn_s=0.0, progress=False
    )
    assert "".join(order) == "ab" + "ababab"
    assert [len(timing.samples_s) for timing in timings.values()] == [3, 3]


def test_a_short_call_is_repeated_and_a_long_one_is_not() -> None:
    timings = interleaved(
        {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.03)},
        rounds=2,
        min_turn_s=0.02,
        progress=False,
    )
    assert timings["long"].repeats == 1
    assert 2 <= timings["short"].repeats <= 20
    assert timings["short"].median_s < 0.02 < timings["long"].median_s


def test_median_and_quartiles() -> None:
    timing = Timing((4.0, 1.0, 3.0, 2.0, 10.0), repeats=1)
    assert (timing.median_s, timing.quartiles_s, timing.iqr_s) == (3.0, (2.0, 4.0), 2.0)
    assert Timing((2.5,), repeats=1).iqr_s == 0.0


@pytest.mark.parametrize("arguments", [{"rounds": 0}, {"warmup": 0}])
def test_no_rounds_is_an_error(arguments: dict) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        interleaved({"a": int}, **arguments)


def test_nothing_to_time_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to time"):
        interleaved({})


def test_peak_memory_sees_what_was_freed_again() -> None:
    size = 64 * 2**20
    rise = peak_memory(lambda: torch.ones(size, dtype=torch.uint8))
    if rise is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 0.97 * size <= rise < 1.5 * size
    assert peak_memory(lambda: None) < size // 8


def test_shared_weights_count_once_and_buffers_count() -> None:
    module = nn.ModuleList([nn.Linear(5, 3), nn.BatchNorm1d(7)])
    linear, norm = 4 * (15 + 3), 4 * 4 * 7 + 8  # the batch norm counts its batches in one int64
    assert weight_bytes(module) == linear + norm
    module.append(nn.Linear(5, 3, bias=False))
    module[2].weight = module[0].weight
    assert weight_bytes(module) == linear + norm
    module.append(module[0])
    assert weight_bytes(module) == linear + norm


def test_half_precision_halves_the_bytes() -> None:
    assert weight_bytes(nn.Linear(8, 4).half()) * 2 == weight_bytes(nn.Linear(8, 4))


@pytest.mark.filterwarnings("ignore")  # torch.ao announces its successor
@pytest.mark.parametrize(("qconfig", "channels"), [("default_dynamic_qconfig", 1), ("per_channel_dynamic_qconfig", 3)])
def test_packed_int8_weights_are_counted(qconfig: str, channels: int) -> None:
    config = getattr(torch.ao.quantization, qconfig)
    packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(5, 3)), {nn.Linear: config})
    assert sum(p.nbytes for p in packed.parameters()) == 0
    assert weight_bytes(packed) == 15 + 8 * channels + 4 * 3


class _Compressed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(100, 100)

    @property
    def weight_bytes(self) -> int:
        return 42


def test_a_module_that_knows_its_bytes_is_believed() -> None:
    assert weight_bytes(_Compressed()) == 42
    assert weight_bytes(nn.Sequential(nn.Linear(2, 1), _Compressed())) == 4 * 3 + 42
