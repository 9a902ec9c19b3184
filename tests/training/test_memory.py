"""The estimate is the bytes that are really there: of networks, optimizers and averages, and of what autograd keeps."""

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from small_pipelines import small_pipeline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from diffusion_opt.flow import ClassCondition
from diffusion_opt.models import Flux2Velocity, TokenCondition, velocity_model
from diffusion_opt.training.lora import LoraSettings, adapters
from diffusion_opt.training.memory import (
    Need,
    fake_weights,
    kept_for_backward,
    kept_with_checkpointing,
    need_of_frozen,
    need_of_role,
    table,
)


def size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def loss_of(model: Flux2Velocity, batch: int = 2) -> Callable[[], Tensor]:
    x, t = torch.ones(batch, 1, 16, 16), torch.full((batch,), 0.5)
    condition = TokenCondition(torch.ones(batch, 1, 24), torch.ones(1, 1, 24))
    return lambda: model(x, t, condition).square().mean()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_role_takes_what_training_it_takes(adapted):
    network: nn.Module = velocity_model(small_pipeline())
    if adapted:
        network = adapters(network, ("student",), LoraSettings(rank=3))["student"]
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    x, t, condition = torch.ones(2, 1, 16, 16), torch.ones(2), ClassCondition(torch.tensor([1, 2]), 10)
    network(x, t, condition).square().mean().backward()
    optimizer.step()
    need = need_of_role("student", network, world_size=1, averaged=True)
    assert need.weights == size([*network.parameters(), *network.buffers()])
    assert need.gradients == size([p.grad for p in network.parameters()])
    assert need.moments == size([v for state in optimizer.state.values() for v in state.values()])
    assert need.average == size([*average.parameters(), *average.buffers()])
    assert need.gathered == need.activations == 0
    assert need.total == need.weights + need.gradients + need.moments + need.average


def test_frozen_weights_have_no_gradients():
    network = velocity_model(small_pipeline())
    network.transformer.requires_grad_(False)
    need = need_of_role("student", network, world_size=1, averaged=False)
    assert need.gradients == size(list(network.embedder.parameters())) and need.average == 0
    frozen = need_of_frozen("teacher", network, world_size=8)
    assert frozen.total == frozen.weights == need.weights


def test_sharded_networks_hold_their_rows_and_gather_their_largest_blocks():
    network = nn.Sequential(nn.Linear(4, 5), nn.ModuleList([nn.Linear(6, 7), nn.Linear(2, 3), nn.Linear(8, 9)]))
    need = need_of_role("student", network, world_size=2, averaged=True, sharded=True)
    rows = 3 * (4 + 1) + 4 * (6 + 1) + 2 * (2 + 1) + 5 * (8 + 1)  # ceil(rows / 2) of each weight and bias
    assert (need.weights, need.gradients, need.average) == (4 * rows, 4 * rows, 4 * rows)
    assert need.moments == 2 * 4 * rows + 4 * 8
    assert need.gathered == 4 * (5 * 5 + 7 * 7 + 9 * 9)
    frozen = need_of_frozen("teacher", network, world_size=2, sharded=True)
    assert (frozen.weights, frozen.gathered, frozen.total) == (need.weights, need.gathered, frozen.weights + 4 * 155)
    replicated = need_of_role("student", network, world_size=2, averaged=False)
    assert replicated.gathered == replicated.gradients == replicated.weights == 4 * (25 + 49 + 9 + 81)


def test_autograd_keeps_as_much_under_fake_tensors_as_in_truth():
    network = velocity_model(small_pipeline())
    measured = kept_for_backward(loss_of(network), network)
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel.from_config(network.transformer.config)
    fake = Flux2Velocity(transformer, None, network._vae[0])
    with FakeTensorMode():
        fake_weights(fake)
        estimated = kept_for_backward(loss_of(fake), fake)
        assert kept_for_backward(loss_of(fake, batch=4), fake) > 1.9 * estimated
    assert estimated == measured > size(list(network.transformer.proj_out.parameters()))


def test_fake_weights_are_shared_where_weights_were():
    config = small_pipeline().transformer.config
    with torch.device("meta"):
        base = Flux2Transformer2DModel.from_config(config)
        student = adapters(base, ("student",), LoraSettings(rank=3))["student"]
    before = size([*base.parameters(), *student.parameters()])
    with FakeTensorMode():
        fake_weights(base, student)
    assert size([*base.parameters(), *student.parameters()]) == before
    inside = {id(p) for p in base.parameters()}
    assert all(id(p) in inside and p.device.type == "cpu" and p.requires_grad for p in student.parameters())


def test_what_autograd_keeps_by_hand():
    layer = nn.Linear(3, 5)
    x = torch.ones(7, 3)
    assert kept_for_backward(lambda: layer(x).sigmoid().sum(), layer) == 4 * (7 * 3 + 7 * 5)


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block():
    network = velocity_model(small_pipeline())
    loss = loss_of(network)
    whole, part = kept_for_backward(loss, network), kept_with_checkpointing(loss, network, network.transformer)
    assert not network.transformer.is_gradient_checkpointing
    assert part < 0.8 * whole and kept_for_backward(loss, network) == whole

    inside = []

    def measured(block: nn.Module, *args: object) -> object:
        inside.append(kept_for_backward(lambda: block(*args)[0].sum(), network))
        return checkpoint(block.__call__, *args, use_reentrant=False)

    network.transformer.enable_gradient_checkpointing(measured)
    outside = kept_for_backward(loss, network)
    assert max(inside) < part and outside < part


def test_the_table_is_in_gibibytes_and_sums():
    lines = table([Need("student", weights=2**31, moments=2**30), Need("teacher", weights=2**29)]).splitlines()
    assert lines[0].split()[:3] == ["GiB", "per", "process"] and lines[0].split()[-1] == "total"
    assert lines[1].split() == ["student", "2.00", "0.00", "1.00", "0.00", "0.00", "0.00", "3.00"]
    assert lines[3].split() == ["sum", "2.50", "0.00", "1.00", "0.00", "0.00", "0.00", "3.50"]
