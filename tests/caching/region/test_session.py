"""What a session remembers, when it must forget, and that it leaves no trace."""

import copy

import pytest
import torch
from caching.region.models import CASES, NUM_TOKENS, noise
from caching.region.script import Script, scripted
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn

from diffusion_opt.caching.region.session import RegionSession, attach, attached_session, detach
from diffusion_opt.caching.step.stack import COMPILED_HOOK_NAME

SOME = torch.tensor([2, 3, 9])
FLUX2 = CASES["flux2"]
BATCHED = ("hidden_states", "encoder_hidden_states", "timestep")


@pytest.fixture
def module() -> nn.Module:
    return FLUX2.made()


def reasons(session: RegionSession) -> list[str]:
    return [p.reason for p in session.passes]


def traces(transformer: nn.Module) -> list[str]:
    return [name for name, m in transformer.named_modules() if {"_diffusers_hook", "forward"} & set(vars(m))]


def run(module: nn.Module, times: tuple[float, ...] = (0.8, 0.4), **changes: object) -> None:
    """One generation."""
    for time in times:
        module(**FLUX2.call(time) | changes)


def test_each_step_and_context_has_its_own_slot(module):
    with scripted(module) as (script, session):
        for time in (0.8, 0.4):
            for name in ("cond", "uncond"):
                with module.cache_context(name):
                    module(**FLUX2.call(time))
        assert sorted(session.slots) == [("cond", 0), ("cond", 1), ("uncond", 0), ("uncond", 1)]
        script.index = SOME
        run(module)
        assert reasons(session) == ["nothing stored"] * 2, "another context"
        with module.cache_context("cond"):
            run(module)
        assert reasons(session) == ["as told"] * 2
        assert session.report().work == pytest.approx(len(SOME) / NUM_TOKENS)


def test_unnamed_guidance_passes_are_told_apart_by_their_order(module):
    session = attach(module, Script())
    with torch.no_grad():
        for _ in range(2):
            for time in (0.8, 0.4):
                for text in (noise(2, 3, 12, seed=1), noise(2, 3, 12, seed=2)):
                    module(**FLUX2.call(time) | {"encoder_hidden_states": text})
    assert sorted(session.slots) == [("default", 0), ("default", 1), ("pass 2", 0), ("pass 2", 1)]
    assert len(session.passes) == 4


def test_one_slot_for_all_steps_lasts_for_one_generation(module):
    with scripted(module, slot_per_step=False) as (script, session):
        script.index = SOME
        for _ in range(2):
            run(module, (0.9, 0.6, 0.3))
            assert reasons(session) == ["nothing stored", "as told", "as told"]
        assert list(session.slots) == [("default", 0)]
        assert script.begun == 2


@pytest.mark.parametrize("times", [(0.8,), (0.8, 0.4), (0.8, 0.4, 0.4)], ids=["one step", "falling", "twice a step"])
def test_a_generation_begins_when_time_rises_or_returns_to_its_start(module, times):
    with scripted(module) as (script, session):
        for generation in (1, 2, 3):
            run(module, times)
            assert script.begun == generation
            assert [p.step for p in session.passes] == list(range(len(times)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"encoder_hidden_states": noise(2, 3, 12, seed=5)}, "other condition"),
        ({"encoder_hidden_states": noise(2, 4, 12), "txt_ids": torch.zeros(4, 4)}, "other condition"),
        ({"joint_attention_kwargs": {"scale": 0.5}}, "other condition"),
        ({"timestep": torch.full((2,), 0.5)}, "other schedule"),
        ({name: value[:1] for name, value in FLUX2.call(0.8).items() if name in BATCHED}, "other condition"),
    ],
    ids=["text", "length of the text", "LoRA scale", "schedule", "batch"],
)
def test_what_changes_every_token_makes_a_full_pass(module, changes, reason):
    with scripted(module) as (script, session):
        run(module, (0.8,))
        script.index = SOME
        run(module, (0.8,))
        assert reasons(session) == ["as told"]
        session.end_generation()
        module(**FLUX2.call(0.8) | changes)
        assert reasons(session)[-1] == reason
        session.end_generation()
        module(**FLUX2.call(0.8) | changes)
        assert reasons(session)[-1] == "as told"


def test_another_type_makes_a_full_pass(module):
    with scripted(module) as (script, session):
        run(module, (0.8,))
        script.index = SOME
        session.end_generation()
        slot = session.slots["default", 0]
        slot.tokens = slot.tokens.double()
        run(module, (0.8,))
        assert reasons(session) == ["other size or type"]


def test_other_weights_make_a_full_generation(module):
    with scripted(module) as (script, session):
        run(module)
        script.index = SOME
        module.proj_out.weight.mul_(1.5)
        run(module)
        assert reasons(session) == ["other weights", "nothing stored"]
        module.proj_out.scaling = {"default": 0.5}  # as PEFT's layers keep it
        run(module)
        run(module)
        module.proj_out.scaling["default"] = 0.7
        run(module)
        assert reasons(session)[0] == "other weights"


def test_nothing_to_compute_runs_no_block(module):
    with scripted(module) as (script, session):
        first = module(**FLUX2.call(0.8))[0]
        script.index = SOME[:0]
        ran = []
        handle = module.x_embedder.register_forward_hook(lambda *_: ran.append(1))
        assert torch.equal(module(**FLUX2.call(0.8))[0], first)
        handle.remove()
        assert not ran
        assert session.passes[-1].num_computed == 0


def test_audio_is_computed_though_no_video_token_is():
    case = CASES["ltx2"]
    module = case.made()
    with scripted(module) as (script, session):
        video, audio = module(**case.call(0.8))
        script.index = SOME[:0]
        louder = case.call(0.8) | {"audio_hidden_states": noise(2, 5, 6, seed=8)}
        same_video, other_audio = module(**louder)
        assert session.passes[-1].num_computed == 3, "an eighth"
        assert torch.equal(same_video[:, 3:], video[:, 3:])
        assert not torch.allclose(other_audio, audio)


def test_an_alarm_does_the_pass_in_full_and_counts_both(module):
    changed = FLUX2.call(0.8) | {"hidden_states": noise(2, NUM_TOKENS, 8, seed=4)}
    with torch.no_grad():
        dense = module(**changed)[0]
    with scripted(module) as (script, session):
        module(**FLUX2.call(0.8))
        script.index, script.alarmed = SOME, True
        assert torch.equal(module(**changed)[0], dense)
        assert session.passes[-1].num_computed == len(SOME) + NUM_TOKENS
        assert "alarm" in str(session.report())
        script.alarmed = False
        module(**changed)
        assert torch.equal(session.slots["default", 0].tokens, changed["hidden_states"])


def test_an_interrupted_pass_leaves_no_half_written_slot(module):
    with scripted(module) as (script, session):
        run(module)
        script.index = SOME
        handle = module.single_transformer_blocks[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            module(**FLUX2.call(0.8))
        handle.remove()
        session.end_generation()
        module(**FLUX2.call(0.8))
        assert reasons(session) == ["nothing stored"]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_lower_precision_is_exact_when_full_and_close_when_not(module):
    changed = FLUX2.call(0.8) | {"hidden_states": noise(2, NUM_TOKENS, 8) + 0.2 * noise(2, NUM_TOKENS, 8, seed=4)}
    outputs, sizes = {}, {}
    for precision in ("native", "bf16", "fp8"):
        with scripted(module, precision=precision) as (script, session):
            full = module(**FLUX2.call(0.8))[0]
            script.index = SOME
            outputs[precision], sizes[precision] = module(**changed)[0][:, SOME], session.report().slot_bytes
        with torch.no_grad():
            assert torch.equal(full, module(**FLUX2.call(0.8))[0])
    errors = {p: float((out - outputs["native"]).norm() / outputs["native"].norm()) for p, out in outputs.items()}
    assert 0 < errors["bf16"] < errors["fp8"] < 0.05
    assert sizes["native"] > sizes["bf16"] > sizes["fp8"]


def test_detach_leaves_no_trace(module, monkeypatch):
    # diffusers makes a backend that is set on one module the default of the process as well.
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    processors = {name: id(p) for name, p in module.attn_processors.items()}
    session = attach(module, None)
    assert attached_session(module) is session
    assert traces(module) == [""]
    module.set_attention_backend("_native_math")
    detach(module)
    assert traces(module) == []
    assert {name: id(p) for name, p in module.attn_processors.items()} == processors
    assert module.transformer_blocks[0].attn.processor._attention_backend == "_native_math"
    with pytest.raises(ValueError, match="no region cache"):
        attached_session(module)


def test_training_passes_are_left_alone(module):
    session = attach(module, None)
    module.train()
    module(**FLUX2.call(0.8))[0].sum().backward()
    assert module.proj_out.weight.grad is not None
    module.eval()
    with pytest.warns(UserWarning, match=r"torch.no_grad"):
        module(**FLUX2.call(0.8))
    assert session.passes == []


def test_two_caches_on_one_transformer_are_refused(module):
    module.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="disable_cache"):
        attach(module, None)
    module.disable_cache()
    attach(module, None)
    with pytest.raises(ValueError, match="already"):
        attach(module, None)
    with pytest.raises(ValueError, match="cannot be deep-copied"):
        copy.deepcopy(module)
    detach(module)
    HookRegistry.check_if_exists_or_initialize(module).register_hook(ModelHook(), COMPILED_HOOK_NAME)
    with pytest.raises(ValueError, match="already"):
        attach(module, None)


def test_a_region_of_another_size_is_refused(module):
    with scripted(module) as (_, session):
        session.mask = torch.ones(NUM_TOKENS + 1, dtype=torch.bool)
        with pytest.raises(ValueError, match=f"{NUM_TOKENS + 1} tokens, but the transformer was given {NUM_TOKENS}"):
            module(**FLUX2.call(0.8))
