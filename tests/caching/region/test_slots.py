"""Storage of keys and values: replaced in place, rounded once, counted to the byte."""

import pytest
import torch
from caching.region.models import noise

from diffusion_opt.caching.region.slots import LayerSlot, Slot, TokenStore

INDEX = torch.tensor([1, 4])


@pytest.mark.parametrize(("precision", "tolerance"), [("native", 0.0), ("bf16", 2**-8), ("fp8", 2**-4)])
def test_tokens_come_back_and_are_replaced_in_place(precision, tolerance):
    x, new = noise(2, 5, 3, 7), noise(2, 2, 3, 7, seed=1)
    store = TokenStore(x, precision)
    expected = x.clone()
    expected[:, INDEX] = new
    before = store.read()
    store.write(INDEX, new)
    assert store.read().dtype == torch.float32
    torch.testing.assert_close(store.read(), expected, rtol=tolerance, atol=tolerance / 8)
    assert torch.equal(before[:, [0, 2, 3]] if precision != "native" else x[:, [0, 2, 3]], store.read()[:, [0, 2, 3]])


def test_each_precision_is_coarser_and_smaller_than_the_last():
    x = noise(2, 5, 3, 16)
    stores = [TokenStore(x, precision) for precision in ("native", "bf16", "fp8")]
    errors = [float((store.read() - x).norm()) for store in stores]
    assert errors == sorted(errors)
    assert errors[0] == 0 < errors[1] < errors[2]
    assert [store.bytes for store in stores] == [4 * x.numel(), 2 * x.numel(), x.numel() + 4 * 2 * 5 * 3]


def test_fp8_scales_each_token_and_head_by_its_own_size():
    x = noise(1, 4, 2, 8) * torch.tensor([1e-3, 1.0, 1e3, 1e6])[None, :, None, None]
    relative = (TokenStore(x, "fp8").read() - x).norm(dim=-1) / x.norm(dim=-1)
    assert float(relative.max()) < 0.05


def test_a_full_pass_gets_its_own_tensors_back_unrounded():
    key, value = noise(1, 4, 2, 8), noise(1, 4, 2, 8, seed=1)
    layer = LayerSlot("fp8")
    full = layer.exchange(None, key, value)
    assert full[0] is key
    assert full[1] is value
    new = noise(1, 2, 2, 8, seed=2)
    keys, values = layer.exchange(torch.tensor([0, 3]), new, -new)
    torch.testing.assert_close(keys[:, [0, 3]], new, rtol=0.07, atol=0.01)
    torch.testing.assert_close(values[:, [1, 2]], value[:, [1, 2]], rtol=0.07, atol=0.01)


def test_an_empty_slot_cannot_take_some_tokens():
    with pytest.raises(ValueError, match="has to compute all tokens"):
        LayerSlot().exchange(INDEX, noise(1, 2, 2, 8), noise(1, 2, 2, 8))


def test_a_slot_keeps_each_token_as_it_was_last_computed():
    slot = Slot([], torch.tensor([0.5]))
    tokens, velocity = noise(2, 5, 3), noise(2, 5, 4, seed=1)
    slot.fill(tokens, velocity)
    whole = slot.update(INDEX, noise(2, 2, 3, seed=2), noise(2, 2, 4, seed=3))
    assert torch.equal(whole[:, INDEX], noise(2, 2, 4, seed=3))
    assert torch.equal(whole[:, [0, 2, 3]], velocity[:, [0, 2, 3]])
    assert torch.equal(slot.tokens[:, INDEX], noise(2, 2, 3, seed=2))
    whole.zero_()
    assert slot.velocity.any(), "the caller may write into what it was given"
    assert slot.bytes == tokens.nbytes + velocity.nbytes


@pytest.mark.wrong_shapes
def test_an_unknown_precision_is_named():
    with pytest.raises(ValueError, match=r"native, bf16, fp8 .* got 'int4'"):
        LayerSlot("int4")


@pytest.mark.gpu
def test_offloaded_slots_live_in_host_memory_and_give_the_same_numbers():
    x, new = noise(2, 5, 3, 8).cuda(), noise(2, 2, 3, 8, seed=1).cuda()
    for precision in ("native", "bf16", "fp8"):
        here, away = TokenStore(x, precision), TokenStore(x, precision, offload=True)
        for store in (here, away):
            store.write(INDEX.cuda(), new)
        assert away.data.device.type == "cpu"
        assert torch.equal(here.read(), away.read())
