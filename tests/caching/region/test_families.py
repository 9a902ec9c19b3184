"""A pass over some tokens, for each family: the dense pass where it must be, and nothing left behind."""

import pytest
import torch
from caching.region.models import CASES, NUM_TOKENS, Case, noise
from caching.region.script import scripted
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor
from torch import Tensor

from diffusion_opt.caching.region import size_of, slot_bytes
from diffusion_opt.caching.region.families import family_of
from diffusion_opt.caching.region.session import attach

ALL = torch.arange(NUM_TOKENS)
SOME = torch.tensor([2, 3, 9, 17])


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def other(call: dict) -> dict:
    """The same call with every token changed."""
    return call | {"hidden_states": noise(*call["hidden_states"].shape, seed=9)}


def equal(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


@torch.no_grad()
def test_full_and_all_active_passes_are_the_dense_pass_bit_for_bit(case):
    module, first = case.made(), case.call(0.7)
    second = other(first)
    dense_first, dense_second = module(**first), module(**second)
    assert not equal(dense_first, dense_second)
    with scripted(module) as (script, session):
        assert equal(module(**first), dense_first)
        script.index = ALL
        assert equal(module(**second), dense_second)
        assert [p.num_computed for p in session.passes] == [NUM_TOKENS]
    assert equal(module(**first), dense_first)


@torch.no_grad()
def test_some_tokens_of_an_unchanged_input_get_the_dense_velocity(case):
    module, call = case.made(), case.call(0.7)
    dense = module(**call)
    with scripted(module) as (script, session):
        module(**call)
        slot = next(iter(session.slots.values()))
        slot.velocity.zero_()
        script.index = SOME
        out = module(**call)
        torch.testing.assert_close(slot.velocity[:, SOME], family_velocity(module, call, dense)[:, SOME])
        assert not slot.velocity[:, 0].any()
    for mine, theirs in zip(out[1:], dense[1:], strict=True):  # audio
        torch.testing.assert_close(mine, theirs)


def family_velocity(module: torch.nn.Module, call: dict, output: tuple[Tensor, ...]) -> Tensor:
    """The output of a dense pass as velocity of tokens."""
    family = family_of(module)
    return family.tokens({**call, "hidden_states": output[0]}) if output[0].ndim == 3 else patches(family, output[0])


def patches(family: object, sample: Tensor) -> Tensor:
    """Wan's output is a video; its head lays a patch out with the channels last."""
    return family._patches(sample).permute(0, 1, 2, 3, 5, 6, 7, 4).flatten(4).flatten(1, 3)


@torch.no_grad()
def test_changed_tokens_see_the_old_keys_of_the_others(case):
    module, call = case.made(), case.call(0.7)
    changed = call | {"hidden_states": call["hidden_states"].clone()}
    tokens = changed["hidden_states"]
    (tokens if tokens.ndim == 3 else tokens.flatten(2).transpose(1, 2))[:, 0] += 1
    with scripted(module) as (script, _):
        module(**call)
        script.index = torch.tensor([0])
        partial = module(**changed)[0]
    dense, before = module(**changed)[0], module(**call)[0]
    assert float((partial - dense).norm()) < float((before - dense).norm())
    assert not torch.equal(partial, dense)


def test_positions_name_each_token_once(case):
    family = family_of(case.made())
    positions = family.positions(case.call(0.7))
    assert positions.shape == (NUM_TOKENS, 3)
    assert len({tuple(row) for row in positions.tolist()}) == NUM_TOKENS
    assert family.tokens(case.call(0.7)).shape[1] == NUM_TOKENS


@torch.no_grad()
def test_the_planner_knows_the_slots_to_the_byte(case):
    module = case.made()
    num_text = 3 if case is CASES["flux2"] else 0
    for precision in ("native", "bf16", "fp8"):
        with scripted(module, precision=precision) as (_, session):
            module(**case.call(0.7))
            planned = slot_bytes(size_of(module, NUM_TOKENS, num_text), precision)
            assert session.report().slot_bytes == 2 * planned, "the calls have a batch of two"


@torch.no_grad()
def test_outputs_come_in_the_form_that_was_asked_for(case):
    module, call = case.made(), case.call(0.7)
    dense = module(**call | {"return_dict": True})
    with scripted(module):
        out = module(**call | {"return_dict": True})
    assert type(out) is type(dense)
    assert torch.equal(out.sample, dense.sample)


@torch.no_grad()
def test_wan_and_ltx_take_a_time_for_each_token():
    for name in ("wan", "ltx"):
        module, call = CASES[name].made(), CASES[name].call(0.7)
        call |= {"timestep": torch.linspace(100, 900, 2 * NUM_TOKENS).view(2, NUM_TOKENS)}
        dense = module(**call)[0]
        with scripted(module) as (script, _):
            assert torch.equal(module(**call)[0], dense)
            script.index = SOME
            torch.testing.assert_close(module(**call)[0], dense)


@pytest.mark.parametrize(("name", "argument"), [("flux2", "kv_cache_mode"), ("ltx", "attention_kwargs")])
@torch.no_grad()
def test_arguments_that_do_not_go_with_it_are_refused(name, argument):
    module = CASES[name].made()
    with scripted(module), pytest.raises(ValueError, match=f"{argument}="):
        module(**CASES[name].call(0.7) | {argument: {"scale": 0.5} if argument == "attention_kwargs" else "extract"})


@torch.no_grad()
def test_unknown_classes_and_processors_are_named():
    script = None
    with pytest.raises(ValueError, match="got AutoencoderKL"):
        attach(AutoencoderKL(block_out_channels=(32,)), script)
    with torch.device("meta"):
        pixart = PixArtTransformer2DModel(
            num_layers=1, num_attention_heads=2, attention_head_dim=4, cross_attention_dim=8
        )
    with pytest.raises(ValueError, match="got PixArtTransformer2DModel"):
        attach(pixart, script)
    module = CASES["flux2"].made()
    compiled = type("OptimizedModule", (torch.nn.Module,), {"_orig_mod": module})  # torch.compile takes seconds
    with pytest.raises(ValueError, match=r"OptimizedModule \(apply the region cache before torch.compile"):
        attach(compiled(), script)
    stock = module.transformer_blocks[0].attn.processor
    module.transformer_blocks[1].attn.set_processor(Flux2KVAttnProcessor())
    with pytest.raises(ValueError, match="layer 1 has Flux2KVAttnProcessor"):
        attach(module, script)
    assert module.transformer_blocks[0].attn.processor is stock, "refused means untouched"
