"""One frozen network, several roles: the teacher stays what it was, adapters train alone and fold in exactly."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_pipelines import generate, small_pipeline
from torch import Tensor, nn

from diffusion_opt.flow import ClassCondition
from diffusion_opt.models import Flux2Velocity, velocity_model
from diffusion_opt.training import Role, TrainConfig, TrainResult, train
from diffusion_opt.training.lora import Adapted, LoraSettings, adapters, checkpoint_blocks, merged

RANK = 3
Given = tuple[Tensor, Tensor, ClassCondition]


@pytest.fixture
def base() -> Flux2Velocity:
    return velocity_model(small_pipeline()).eval()


@pytest.fixture
def given() -> Given:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 1, 16, 16, generator=generator)
    return x, torch.tensor([0.3, 0.8]), ClassCondition(torch.tensor([1, 4]), 10)


def fill(adapted: Adapted, seed: int = 0) -> None:
    """Give B values, or the adapter would change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.normal_(std=0.1, generator=generator)


class TwoAdapters:
    """Two roles on one base; the student follows a fixed direction through the teacher, the other one the student."""

    def __init__(self, base: Flux2Velocity, given: Given) -> None:
        self.teacher, self.given = base, given
        self.networks = adapters(base, ("student", "fake_score"), LoraSettings(rank=RANK))

    @property
    def roles(self) -> dict[str, Role]:
        return {name: Role(network) for name, network in self.networks.items()}

    def turn(self, step: int) -> str:
        return ("student", "fake_score")[step % 2]

    def losses(self, generator: torch.Generator, batch_size: int, turn: str) -> dict[str, Tensor]:
        x, t, condition = self.given
        target = 1 + self.teacher(x, t, condition)
        with torch.no_grad():
            self.networks["student"](x, t, condition)
        loss = (self.networks[turn](x, t, condition) - target).square().mean()
        with torch.no_grad():
            self.networks["fake_score"](x, t, condition)  # after the pass with gradient, as a logged value may do
        return {"loss": loss}


def run(out: Path, method: TwoAdapters, steps: int = 4) -> TrainResult:
    config = TrainConfig(steps=steps, batch_size=2, learning_rate=1e-2, warmup_steps=1, decay_fraction=0.0)
    return train(method, config, out, progress=False)


def test_a_fresh_adapter_and_the_base_give_the_output_from_before(base, given):
    before = base(*given)
    student = adapters(base, ("student",), LoraSettings(rank=RANK))["student"]
    assert torch.equal(student(*given), before) and torch.equal(base(*given), before)
    fill(student)
    assert not torch.allclose(student(*given), before, atol=1e-3)
    assert torch.equal(base(*given), before)


def test_training_moves_the_adapters_alone_and_never_the_teacher(tmp_path, base, given):
    before, weights = base(*given), {name: p.clone() for name, p in base.named_parameters()}
    method = TwoAdapters(base, given)
    start = {role: [p.clone() for p in network.parameters()] for role, network in method.networks.items()}
    run(tmp_path, method)
    assert torch.equal(base(*given), before)
    frozen = {name.replace(".base_layer", ""): p for name, p in base.named_parameters() if "lora_" not in name}
    assert frozen.keys() == weights.keys() and all(torch.equal(frozen[name], weights[name]) for name in weights)
    assert not any(p.requires_grad for p in frozen.values())
    for role, network in method.networks.items():
        assert not any(torch.equal(a, b) for a, b in zip(start[role], network.parameters(), strict=True))


def test_adapters_learn_apart(base, given):
    networks = adapters(base, ("student", "fake_score"), LoraSettings(rank=RANK))
    for network in networks.values():
        fill(network)
    networks["student"](*given).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in networks["student"].parameters())
    assert all(p.grad is None for p in networks["fake_score"].parameters())


def test_only_adapters_are_saved_under_the_names_of_diffusers(tmp_path, base, given):
    method = TwoAdapters(base, given)
    run(tmp_path, method)
    saved = load_file(tmp_path / "checkpoint" / "student.safetensors")
    linear = [
        name for name, module in velocity_model(small_pipeline()).named_modules() if isinstance(module, nn.Linear)
    ]
    assert saved.keys() == {f"{name}.lora_{part}.weight" for name in linear for part in "AB"}
    assert all(RANK in tensor.shape for tensor in saved.values())
    assert saved.keys() == load_file(tmp_path / "checkpoint" / "ema.safetensors").keys()


def test_resume_is_bit_exact(tmp_path, given):
    def fresh() -> TwoAdapters:
        return TwoAdapters(velocity_model(small_pipeline()).eval(), given)

    whole = run(tmp_path / "whole", fresh(), steps=4)
    run(tmp_path / "parts", fresh(), steps=3)
    parts = run(tmp_path / "parts", fresh(), steps=4)
    assert (parts.step, len(list(parts.ema.parameters()))) == (4, len(list(whole.ema.parameters())))
    for a, b in zip(whole.ema.parameters(), parts.ema.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_average_shares_the_base_and_computes_with_its_own_weights(tmp_path, base, given):
    method = TwoAdapters(base, given)
    average = run(tmp_path, method).ema
    student = method.networks["student"]
    assert average.base is base and not torch.equal(average(*given), student(*given))
    average.load_state_dict(student.state_dict())
    assert torch.equal(average(*given), student(*given))


def test_merged_is_the_adapted_network_without_adapters(base, given):
    student, other = adapters(base, ("student", "other"), LoraSettings(rank=RANK, alpha=5.0)).values()
    fill(student, 1)
    fill(other, 2)
    averaged = copy.deepcopy(student)
    fill(averaged, 3)
    for network in (student, averaged):
        alone = merged(network)
        assert alone.state_dict().keys() == velocity_model(small_pipeline()).state_dict().keys()
        torch.testing.assert_close(alone(*given), network(*given), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(student(*given), averaged(*given), atol=1e-3)


def test_scale_is_alpha_over_rank(base):
    student = adapters(base, ("student",), LoraSettings(rank=4, alpha=2.0, targets=("proj_out",)))["student"]
    fill(student)
    a, b = (dict(student.named_parameters())[f"transformer.proj_out.lora_{part}.weight"] for part in "AB")
    change = merged(student).transformer.proj_out.weight - base.transformer.proj_out.base_layer.weight
    torch.testing.assert_close(change, 0.5 * b @ a)
    assert len(list(student.parameters())) == 2


def test_checkpointed_blocks_are_computed_again_with_their_adapter(base, given):
    networks = adapters(base, ("student", "fake_score"), LoraSettings(rank=RANK))
    student = networks["student"]
    for seed, network in enumerate(networks.values()):
        fill(network, seed)
    gradients = []
    for _ in range(2):
        base.train()
        student(*given).square().mean().backward()
        gradients.append([p.grad.clone() for p in student.parameters()])
        student.zero_grad()
        checkpoint_blocks(base.transformer)
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_adapters_of_a_base_in_half_precision_are_in_single(base, given):
    half = base.to(torch.bfloat16)
    student = adapters(half, ("student",), LoraSettings(rank=RANK))["student"]
    fill(student)
    x, t, condition = given
    output = student(x.bfloat16(), t, condition)
    assert {p.dtype for p in student.parameters()} == {torch.float32} and output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in student.parameters())


def test_diffusers_opens_the_saved_adapter(base):
    pipe = small_pipeline()
    velocity = velocity_model(pipe)
    targets = ("to_q", "to_k", "to_v")
    student = adapters(velocity, ("student",), LoraSettings(rank=RANK, targets=targets))["student"]
    fill(student)
    alone = small_pipeline()
    before = generate(alone)
    alone.load_lora_weights({name: p.detach().clone() for name, p in student.state_dict().items()})
    pipe.transformer = merged(student).transformer
    after = generate(alone)
    torch.testing.assert_close(after, generate(pipe), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 0}, "rank must be positive, got 0"), ({"targets": ("nothing",)}, "no linear layer ends with one of")],
)
def test_settings_that_make_no_sense(base, settings, message):
    with pytest.raises(ValueError, match=message):
        adapters(base, ("student",), LoraSettings(**settings))


def test_a_network_takes_adapters_once(base):
    adapters(base, ("student",))
    with pytest.raises(ValueError, match="has adapters already"):
        adapters(base, ("fake_score",))
