"""The scoped backend of diffusers: same output, only where asked, and everything as it was afterwards."""

import copy

import pytest
import torch
from diffusers.models import attention_dispatch as dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from small_transformers import family_pass, family_pipeline, family_sample, small_transformer
from torch import Tensor, nn

from diffusion_opt.kernels import diffusers_backend
from diffusion_opt.kernels.attention.sparse.masks import BlockMask
from diffusion_opt.kernels.diffusers_backend import BACKENDS, attention_backend

FAMILIES = ("flux2", "ltx2", "wan")
ATTENTIONS = {"flux2": 1, "ltx2": 6, "wan": 2}  # attention modules of a block
KINDS = {  # of LTX-2: video and audio with themselves, with their text, and with each other
    "attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn",
}  # fmt: skip


def arguments(family: str) -> dict:
    """A pass at t = 0.4; LTX-2 with padded prompts, which become a float bias of shape (b, h, 1, tokens)."""
    given = family_pass(family, 0.4)
    if family == "ltx2":
        padded = torch.ones(2, 5)
        padded[1, 3:] = 0
        given |= {"encoder_attention_mask": padded, "audio_encoder_attention_mask": padded}
    return given


def outputs(transformer: nn.Module, given: dict) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(out for out in transformer(**given) if out is not None)


def chosen_backends(transformer: nn.Module) -> dict[str, object]:
    found = [(name, module.processor) for name, module in transformer.named_modules() if hasattr(module, "processor")]
    return {name: vars(processor).get("_attention_backend", "class") for name, processor in found}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What reaches our front, while it still computes."""
    seen = []
    front = diffusers_backend.attention

    def watched(q, k, v, mask=None, **options):
        out = front(q, k, v, mask, **options)
        seen.append({"q": q.shape, "k": k.shape, "mask": mask, **options})
        return out

    monkeypatch.setattr(diffusers_backend, "attention", watched)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_output_is_that_of_diffusers_own_backend(family, calls):
    transformer, given = small_transformer(family, blocks=2), arguments(family)
    want = outputs(transformer, given)
    with attention_backend(transformer, "diffopt-dense") as switched:
        got = outputs(transformer, given)
    assert len(calls) == len(switched) == 2 * ATTENTIONS[family]
    assert len(got) == len(want) == (2 if family == "ltx2" else 1)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["flux2", "wan"])
def test_without_a_mask_the_output_has_the_same_bits(family):
    transformer, given = small_transformer(family, blocks=2), arguments(family)
    want = outputs(transformer, given)
    with attention_backend(transformer, "diffopt-dense"):
        assert all(torch.equal(one, other) for one, other in zip(outputs(transformer, given), want, strict=True))


def test_ltx2_calls_every_kind_of_attention_with_its_bias(calls):
    transformer = small_transformer("ltx2", blocks=1)
    with attention_backend(transformer, "diffopt-dense") as switched:
        outputs(transformer, arguments("ltx2"))
    assert {name.rpartition(".")[2] for name in switched} == KINDS
    biased = [call for call in calls if call["mask"] is not None]
    assert len(biased) == 2  # video and audio looking at their text
    assert all(call["mask"].dtype == torch.float32 and call["mask"].shape == (2, 2, 1, 5) for call in biased)
    video, audio, text = 12, 7, 5
    assert [(call["q"][2], call["k"][2]) for call in calls] == [
        (video, video), (audio, audio), (video, text), (audio, text), (video, audio), (audio, video),
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "diffopt-dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_changes_the_output_a_little(family, name):
    transformer, given = small_transformer(family, blocks=2), arguments(family)
    want = outputs(transformer, given)
    with attention_backend(transformer, name):
        got = outputs(transformer, given)
    for one, other in zip(got, want, strict=True):
        assert not torch.equal(one, other)
        assert (one - other).norm() < 0.2 * other.norm()


def test_first_and_last_blocks_can_stay_dense(calls):
    transformer = small_transformer("flux2", blocks=4)
    with attention_backend(transformer, "diffopt-int8", keep_dense=(1, 2)) as switched:
        outputs(transformer, arguments("flux2"))
        left = {name for name, backend in chosen_backends(transformer).items() if backend == "class"}
    assert switched == ("transformer_blocks.1.attn",)
    assert left == {"transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"}
    assert [call["precision"] for call in calls] == ["int8"]


def test_a_whole_pipeline_runs_on_it_and_forgets_it(calls):
    pipe = family_pipeline("flux2", blocks=2)
    want = family_sample(pipe, steps=2)
    with attention_backend(pipe, "diffopt-dense"):
        assert torch.equal(family_sample(pipe, steps=2), want)
    assert len(calls) == 2 * 2 * 2  # steps, passes of guidance, blocks
    family_sample(pipe, steps=2)
    assert len(calls) == 8


def test_the_default_of_the_process_and_other_models_are_left_alone(calls):
    before = _AttentionBackendRegistry.get_active_backend()
    switched, other = small_transformer("flux2", blocks=2), small_transformer("flux2", blocks=2)
    with attention_backend(switched, "diffopt-dense"):
        assert _AttentionBackendRegistry.get_active_backend() == before
        outputs(other, arguments("flux2"))
    assert not calls
    assert _AttentionBackendRegistry.get_active_backend() == before
    assert set(chosen_backends(switched).values()) == {"class"}


def test_an_exception_restores_too():
    transformer = small_transformer("wan", blocks=1)
    with pytest.raises(KeyError), attention_backend(transformer, "diffopt-int8"):
        raise KeyError
    assert set(chosen_backends(transformer).values()) == {"class"}
    assert not any(module._forward_pre_hooks for module in transformer.modules())


def test_contexts_nest_and_give_back_what_was_chosen():
    transformer = small_transformer("flux2", blocks=2)
    transformer.transformer_blocks[0].attn.set_attention_backend("_native_math")
    mine = chosen_backends(transformer)
    with attention_backend(transformer, "diffopt-int8"):
        outer = chosen_backends(transformer)
        with attention_backend(transformer, "diffopt-dense", keep_dense=(1, 0)):
            assert list(chosen_backends(transformer).values()) == ["diffopt-int8", "diffopt-dense"]
        assert chosen_backends(transformer) == outer
        assert set(outer.values()) == {"diffopt-int8"}
    assert chosen_backends(transformer) == mine
    assert set(mine.values()) == {AttentionBackendName._NATIVE_MATH, "class"}


def test_registering_twice_adds_no_second_name_and_strings_find_it():
    diffusers_backend.register()
    names = list(AttentionBackendName)
    diffusers_backend.register()
    assert list(AttentionBackendName) == names
    assert AttentionBackendName("diffopt-int8").value == "diffopt-int8"
    assert copy.deepcopy(AttentionBackendName("diffopt-int8")) is AttentionBackendName("diffopt-int8")
    transformer = small_transformer("flux2", blocks=2)
    transformer.transformer_blocks[0].attn.set_attention_backend("diffopt-dense")  # diffusers' own method, by name


def test_sparsity_is_asked_for_by_layer_and_reaches_that_layer_only(calls):
    transformer, given = small_transformer("wan", blocks=2), arguments("wan")
    tiles = BlockMask.from_dense(torch.tensor([[True, False], [False, True]])[None, None], 8, 8)
    asked = []

    def sparsity(layer: str, q: Tensor, k: Tensor) -> BlockMask | None:
        asked.append(layer)
        return tiles if layer == "blocks.1.attn1" else None

    want = outputs(transformer, given)
    with attention_backend(transformer, "diffopt-dense", sparsity=sparsity):
        got = outputs(transformer, given)
    assert asked == ["blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1", "blocks.1.attn2"]
    assert [call["sparsity"] for call in calls] == [None, None, tiles, None]
    assert not torch.equal(got[0], want[0])
    assert diffusers_backend._pattern.get() is None
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in transformer.modules())


def test_a_failing_pattern_leaves_no_state_behind():
    transformer = small_transformer("wan", blocks=1)
    with pytest.raises(KeyError), attention_backend(transformer, "diffopt-dense", sparsity=lambda *_: {}["tiles"]):
        outputs(transformer, arguments("wan"))
    assert diffusers_backend._pattern.get() is None
    assert set(chosen_backends(transformer).values()) == {"class"}


def test_all_tiles_are_dense_attention():
    transformer, given = small_transformer("flux2", blocks=2), arguments("flux2")
    full = BlockMask.from_dense(torch.ones(1, 1, 3, 3, dtype=torch.bool), 8, 8)  # 12 + 5 tokens
    want = outputs(transformer, given)
    with attention_backend(transformer, "diffopt-dense", sparsity=lambda layer, q, k: full):
        torch.testing.assert_close(outputs(transformer, given), want, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_switched_is_refused():
    flux = small_transformer("flux2", blocks=2)
    with pytest.raises(ValueError, match="no backend 'diffopt-int4'; there are diffopt-dense"):
        attention_backend(flux, "diffopt-int4").__enter__()
    with pytest.raises(ValueError, match=r"keep_dense=\(1, 1\) must leave some of the 2 blocks"):
        attention_backend(flux, "diffopt-int8", keep_dense=(1, 1)).__enter__()
    with pytest.raises(ValueError, match="sparsity needs the backend 'diffopt-dense'"):
        attention_backend(flux, "diffopt-int8", sparsity=lambda layer, q, k: None).__enter__()
    with pytest.raises(ValueError, match=r"SD3Transformer2DModel does not send.*JointAttnProcessor2_0"):
        attention_backend(small_transformer("sd3", blocks=1), "diffopt-dense").__enter__()
    with pytest.raises(ValueError, match=r"Linear does not send.*no processors"):
        attention_backend(nn.Linear(2, 2), "diffopt-dense").__enter__()
    processor = flux.transformer_blocks[0].attn.processor
    for block in (*flux.transformer_blocks, *flux.single_transformer_blocks):
        block.attn.processor = processor
    with pytest.raises(ValueError, match="blocks share one"):
        attention_backend(flux, "diffopt-dense", keep_dense=(1, 0)).__enter__()


@pytest.mark.parametrize("option", [{"is_causal": True}, {"dropout_p": 0.1}, {"enable_gqa": True}])
def test_what_the_kernels_do_not_do_is_refused_and_not_dropped(option):
    diffusers_backend.register()
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="have no"):
        dispatch.dispatch_attention_fn(q, q, q, **option, backend=AttentionBackendName("diffopt-dense"))
