"""An identity tells sets of weights apart, sees blocks and adapters, forgives precision, and survives techniques."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from small_transformers import FAMILIES, small_transformer
from torch import nn

from diffusion_opt.models import PointVelocity, build_pipeline, load
from diffusion_opt.models.build import SIZES
from diffusion_opt.models.fingerprint import Identity, identity, remember, same_model, scheduler_fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_it_sees_every_weight(family: str) -> None:
    network = small_transformer(family)
    before = identity(network)
    assert identity(small_transformer(family)) == before == identity(copy.deepcopy(network))
    assert identity(small_transformer(family, seed=1)) != before
    assert identity(small_transformer(family, blocks=3)) != before
    for parameter in (next(network.parameters()), list(network.parameters())[-1]):
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
            assert identity(network) != before
            parameter.view(-1)[-1] -= 1


@pytest.mark.parametrize("place", [0, 1, 17, 8190, 8191])
def test_one_number_of_a_large_tensor_counts(place: int) -> None:
    layer = nn.Linear(8192, 3, bias=False)
    before = identity(layer)
    with torch.no_grad():
        layer.weight[1, place] += 1
    assert identity(layer) != before


def test_the_order_of_rows_counts() -> None:
    layer = nn.Linear(4 * 1009, 50, bias=False)  # as wide as the sums are long: a sum alone would not see it
    before = identity(layer)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.roll(1, 0))
    assert identity(layer) != before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_shipped_model_is_the_same_in_every_precision(dtype: torch.dtype) -> None:
    assert identity(load("fashion-micro", dtype=dtype).transformer) == identity(load("fashion-micro").transformer)


def test_a_float32_network_is_the_same_in_bfloat16() -> None:
    network = PointVelocity(num_classes=2)
    assert identity(copy.deepcopy(network).to(torch.bfloat16)) == identity(network)


def test_the_config_and_the_class_count() -> None:
    pipe = build_pipeline(SIZES["fashion-micro"])
    before = identity(pipe.transformer)
    pipe.transformer.register_to_config(eps=1e-3)
    assert identity(pipe.transformer) != before
    assert identity(nn.Sequential(nn.Linear(2, 2))).weights != identity(nn.ModuleList([nn.Linear(2, 2)])).weights


def lora(network: nn.Module, name: str, seed: int, alpha: float = 4) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q"], init_lora_weights=False)
    inject_adapter_in_model(config, network, adapter_name=name)


def test_active_adapters_count_by_weights_and_scale() -> None:
    bare = identity(small_transformer("sd3"))

    def with_lora(name: str, seed: int, alpha: float = 4) -> nn.Module:
        network = small_transformer("sd3")
        lora(network, name, seed, alpha)
        return network

    network = with_lora("style", 0)
    found = identity(network)
    assert found.weights == bare.weights and found.model != bare.model
    assert found.adapters[0].startswith("style x 2 (")
    assert identity(with_lora("other_name", 0)).model == found.model
    assert identity(with_lora("style", 1)).model != found.model
    assert identity(with_lora("style", 0, alpha=8)).model != found.model
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    assert identity(network) == bare
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge()
    fused = identity(network)
    assert fused.adapters == () and fused.weights != bare.weights


def test_several_networks_are_told_apart_and_one_is_itself() -> None:
    one, two = small_transformer("wan"), small_transformer("wan", seed=1)
    assert identity({"transformer": one}) == identity(one)
    both = identity({"transformer": one, "transformer_2": two})
    assert both != identity({"transformer": two, "transformer_2": one})
    with torch.no_grad():
        next(two.blocks[0].parameters()).add_(1)
    assert both != identity({"transformer": one, "transformer_2": two})


def test_a_technique_makes_no_other_model_as_long_as_nobody_else_does() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    before, weights = identity(network), copy.deepcopy(network[0])
    with same_model(network, "emptied"):
        network[0] = nn.Identity()
    assert identity(network) == Identity(before.weights, (), ("emptied",))
    assert identity(copy.deepcopy(network)).model == before.model
    with same_model(network, "emptied more"):
        network[1] = nn.Identity()
    assert identity(network) == Identity(before.weights, (), ("emptied", "emptied more"))
    network[1] = nn.Linear(4, 5)
    assert identity(network).model not in (before.model, identity(weights).model)
    network[0], other = weights, nn.Sequential(weights, network[1])
    assert identity(network) == identity(other)  # what it was once is forgotten with the layers
    remember(other, before, "packed")
    assert identity(other) == Identity(before.weights, (), ("packed",))


def test_what_has_no_weights_has_no_identity() -> None:
    with pytest.raises(ValueError, match="weight of Linear is on the meta device"):
        identity(nn.Linear(2, 3, device="meta"))


def test_offloaded_weights_are_found() -> None:
    from accelerate import cpu_offload

    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = identity(network)
    cpu_offload(network, execution_device="cpu")
    assert network[0].weight.device.type == "meta"
    assert identity(network) == before


def test_a_scheduler_is_known_by_class_and_settings() -> None:
    scheduler = build_pipeline(SIZES["fashion-micro"]).scheduler
    assert scheduler_fingerprint(scheduler) == scheduler_fingerprint(type(scheduler).from_config(scheduler.config))
    assert scheduler_fingerprint(scheduler) != scheduler_fingerprint(type(scheduler)(shift=3.0))
