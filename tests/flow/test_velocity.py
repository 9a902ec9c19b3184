"""Conditions and guidance: labels, dropping, and the identity limits of the guidance wrapper."""

import pytest
import torch

from diffusion_opt.flow import ClassCondition, GaussianMixtureVelocity, Guided

LABELS = torch.tensor([2, 0, 3])


class Recorder:
    """A velocity model that notes the labels and r of each call."""

    def __init__(self) -> None:
        self.calls = []

    def __call__(self, x_t, t, condition=None, r=None):
        self.calls.append((condition.labels.tolist(), r))
        return x_t


def guided_case():
    ring = GaussianMixtureVelocity.ring(num_modes=7, std=0.3, num_classes=3)
    x_t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    return ring, x_t, torch.linspace(0.1, 0.9, 5), ClassCondition(torch.tensor([0, 1, 2, 1, 0]), 3)


def test_condition_is_counted_and_indexed():
    condition = ClassCondition(LABELS, num_classes=4)
    assert len(condition) == 3
    assert condition[1:].labels.tolist() == [0, 3] and condition[1:].num_classes == 4
    assert condition[torch.tensor([True, False, True])].labels.tolist() == [2, 3]


def test_drop_puts_the_null_label_where_asked():
    condition = ClassCondition(LABELS, num_classes=4)
    assert condition.drop().labels.tolist() == [4, 4, 4]
    assert condition.drop(torch.tensor([False, True, False])).labels.tolist() == [2, 4, 3]
    assert condition.drop(torch.zeros(3, dtype=torch.bool)).labels.tolist() == LABELS.tolist()
    assert condition.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("labels", [[0, 5], [-1, 2]])
def test_labels_out_of_range(labels):
    with pytest.raises(ValueError, match=r"0 … 3 \(or 4 for no class\), got"):
        ClassCondition(torch.tensor(labels), num_classes=4)


def test_scale_one_is_exactly_the_conditional_in_one_pass():
    ring, x_t, t, condition = guided_case()
    assert torch.equal(Guided(ring, 1.0)(x_t, t, condition), ring(x_t, t, condition))
    recorder = Recorder()
    Guided(recorder, 1.0)(x_t, t, condition)
    assert [labels for labels, _ in recorder.calls] == [[0, 1, 2, 1, 0]]


def test_scale_zero_is_exactly_the_unconditional():
    ring, x_t, t, condition = guided_case()
    assert torch.equal(Guided(ring, 0.0)(x_t, t, condition), ring(x_t, t))


def test_guidance_extrapolates_from_null_to_condition():
    ring, x_t, t, condition = guided_case()
    conditional, null = ring(x_t, t, condition), ring(x_t, t)
    expected = null + 3 * (conditional - null)
    torch.testing.assert_close(Guided(ring, 3.0)(x_t, t, condition), expected)
    assert not torch.allclose(expected, conditional, atol=1e-3)


def test_guidance_takes_two_passes_and_hands_r_on():
    _, x_t, t, condition = guided_case()
    recorder = Recorder()
    Guided(recorder, 2.0)(x_t, t, condition, r=t / 2)
    assert [labels for labels, _ in recorder.calls] == [[0, 1, 2, 1, 0], [3, 3, 3, 3, 3]]
    assert all(torch.equal(r, t / 2) for _, r in recorder.calls)


def test_guidance_needs_a_condition():
    ring, x_t, t, _ = guided_case()
    with pytest.raises(ValueError, match="guidance needs a condition, got None"):
        Guided(ring, 2.0)(x_t, t)


def test_outside_its_interval_guidance_is_exactly_none():
    ring, x_t, _, condition = guided_case()
    t = torch.tensor([0.1, 0.3, 0.6, 0.9, 0.95])
    limited = Guided(ring, 3.0, (0.3, 0.9))(x_t, t, condition)
    assert torch.equal(limited[[0, 4]], ring(x_t, t, condition)[[0, 4]])
    assert torch.equal(limited[1:4], Guided(ring, 3.0)(x_t, t, condition)[1:4])


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.9, 0.3), (-0.1, 1.0), (0.0, 1.1)])
def test_an_interval_that_cannot_be_is_refused(interval):
    with pytest.raises(ValueError, match=r"must rise and lie in \[0, 1\], got"):
        Guided(guided_case()[0], 2.0, interval)
