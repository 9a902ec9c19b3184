"""All rungs of a comparison in one run, and ratios only within it."""

import dataclasses
import json
import time

import pytest
import torch
from torch import Tensor, nn

from diffusion_opt.evaluation import Measurement, Rung, machine, measure_together, speedup


class _Generator:
    """Makes 16x16 images from noise by `steps` passes through a linear layer, and waits."""

    def __init__(self, steps: int, wait_s: float = 0.0) -> None:
        self.layer = nn.Linear(256, 256)
        self.steps, self.wait_s = steps, wait_s
        self.noises: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(labels), 256, generator=generator)
        self.noises.append(noise)
        images = noise
        for _ in range(self.steps):
            images = self.layer(images).tanh()
        time.sleep(self.wait_s)
        return images.reshape(-1, 1, 16, 16)


@pytest.fixture(scope="module")
def makers() -> dict[str, _Generator]:
    return {"teacher": _Generator(6, wait_s=0.06), "student": _Generator(1)}


@pytest.fixture(scope="module")
def measured(makers: dict[str, _Generator]) -> dict[str, Measurement]:
    rungs = {name: Rung(maker, maker.layer) for name, maker in makers.items()}
    return measure_together(rungs, num_samples=50, batch_size=20, rounds=2, resamples=10, progress=False)


def test_cost_is_counted_for_an_image(measured: dict[str, Measurement]) -> None:
    assert [measured[name].nfe for name in ("teacher", "student")] == [6, 1]
    assert [measured[name].macs for name in ("teacher", "student")] == [6 * 256**2, 256**2]
    assert measured["teacher"].weight_bytes == 4 * (256**2 + 256)
    assert measured["teacher"].images_per_call == 20


def test_rungs_draw_the_same_noise_and_a_new_one_a_batch(
    makers: dict[str, _Generator], measured: dict[str, Measurement]
) -> None:
    def batches(name: str) -> list[Tensor]:
        drawn = [noise for noise in makers[name].noises if len(noise) > 2]  # without the warm-up of two images
        return [noise for i, noise in enumerate(drawn) if i == 0 or not torch.equal(noise, drawn[i - 1])]

    teacher, student = batches("teacher"), batches("student")
    assert [len(noise) for noise in teacher] == [20, 20, 10, 20]  # the last one is timed only
    assert all(torch.equal(a, b) for a, b in zip(teacher, student, strict=True))


def test_the_first_batch_is_not_timed(measured: dict[str, Measurement]) -> None:
    assert measured["teacher"].protocol.rounds == 2


def test_quality_has_the_sample_count_and_the_gap_to_the_first_rung(measured: dict[str, Measurement]) -> None:
    teacher, student = measured["teacher"].quality, measured["student"].quality
    assert teacher.num_samples == student.num_samples == 50
    assert teacher.teacher is None
    assert student.teacher.feature_rms > 0


def test_speedup_is_the_ratio_of_medians(measured: dict[str, Measurement]) -> None:
    teacher, student = measured["teacher"], measured["student"]
    assert speedup(teacher, student) == pytest.approx(teacher.latency_s / student.latency_s)
    assert speedup(teacher, student) > 3
    assert speedup(teacher, teacher) == 1
    assert teacher.ms_per_image == pytest.approx(1000 * teacher.latency_s / 20)


def test_record_round_trips_through_json(measured: dict[str, Measurement], tmp_path) -> None:
    record = measured["student"]
    assert Measurement.from_json(record.to_json()) == record
    record.save(tmp_path / "student.json")
    assert Measurement.from_json((tmp_path / "student.json").read_text()) == record


def test_a_record_with_a_strange_field_is_refused(measured: dict[str, Measurement]) -> None:
    stored = json.loads(measured["student"].to_json())
    stored["latency"] = stored.pop("latency_s")
    with pytest.raises(ValueError, match="'latency' is missing or unknown"):
        Measurement.from_json(json.dumps(stored))


@pytest.mark.parametrize(
    ("field", "value"), [("run", "another"), ("batch_size", 7), ("num_samples", 9), ("threads", 64), ("device", "cuda")]
)
def test_speedup_names_the_first_mismatch(measured: dict[str, Measurement], field: str, value: object) -> None:
    other = dataclasses.replace(measured["student"].protocol, **{field: value})
    with pytest.raises(ValueError, match=rf"{field} is .* and {value!r}; measure both in one call"):
        speedup(measured["teacher"], dataclasses.replace(measured["student"], protocol=other))


def test_speedup_across_machines_is_refused(measured: dict[str, Measurement]) -> None:
    other = dataclasses.replace(measured["student"], machine={**machine(), "cpu": "abacus"})
    with pytest.raises(ValueError, match=r"machine cpu is .* and 'abacus'"):
        speedup(measured["teacher"], other)


def test_without_samples_there_is_speed_and_no_quality() -> None:
    maker, images = _Generator(2), {}
    record = measure_together(
        {"only": Rung(maker, maker.layer)}, num_samples=0, batch_size=3, rounds=1, progress=False, images=images
    )["only"]
    assert record.quality is None
    assert record.latency_s > 0
    assert images["only"].shape == (3, 1, 16, 16)


def test_settings_that_make_no_sense_are_refused() -> None:
    maker = _Generator(1)
    with pytest.raises(ValueError, match="at least one rung"):
        measure_together({})
    with pytest.raises(ValueError, match="got 0, 5 and 10"):
        measure_together({"only": Rung(maker, maker.layer)}, batch_size=0, num_samples=10)


def test_a_rung_that_makes_too_few_images_is_refused() -> None:
    maker = _Generator(1)
    short = Rung(lambda labels, generator: maker(labels[:-1], generator), maker.layer)
    with pytest.raises(ValueError, match=r"asked for 4 images, got a tensor of shape \(3, 1, 16, 16\)"):
        measure_together({"short": short}, num_samples=4, batch_size=4, progress=False)


def test_machine_tells_what_a_timing_needs_and_nothing_private() -> None:
    described = machine()
    assert described["versions"]["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert described["cores"] >= 1
    assert json.loads(json.dumps(described)) == described
    keys = "cpu cores threads memory_gb gpu gpu_memory_gb os python versions"
    assert set(described) == set(keys.split())
