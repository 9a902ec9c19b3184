"""Slots of real models, computed before anything runs."""

import pytest
from diffusers import Flux2Transformer2DModel, LTX2VideoTransformer3DModel, WanTransformer3DModel
from torch import device

from diffusion_opt.caching.region import MODEL_SIZES, size_of, slot_bytes, slot_table

FLUX2, LTX2, WAN_SMALL, WAN = MODEL_SIZES.values()


@pytest.mark.parametrize(
    ("size", "model"),
    [(FLUX2, Flux2Transformer2DModel), (LTX2, LTX2VideoTransformer3DModel), (WAN, WanTransformer3DModel)],
)
def test_data_agree_with_the_classes(size, model):
    with device("meta"):
        transformer = model()
    read = size_of(transformer, size.num_tokens, size.num_text)
    assert read.layers == size.layers
    assert read.channels == size.channels


def test_bytes_by_hand():
    expected = 56 * 2 * 4608 * 6144 * 2 + 4096 * 256 * 2
    assert slot_bytes(FLUX2) == expected == slot_bytes(FLUX2, "bf16")
    assert slot_bytes(FLUX2, contexts=2, steps=4) == 8 * expected
    fp8 = 56 * 2 * 4608 * (6144 + 48 * 4) + 4096 * 256 * 2
    assert slot_bytes(FLUX2, "fp8") == fp8


def test_the_table_has_a_row_for_each_model():
    lines = slot_table(steps=(1, 4)).splitlines()
    assert len(lines) == 1 + len(MODEL_SIZES)
    assert lines[1].split()[-6:] == ["6.34", "25.4", "6.34", "25.4", "3.27", "13.1"]
    assert all(size.source for size in MODEL_SIZES.values())


def test_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="got 1 and 0"):
        slot_bytes(WAN_SMALL, steps=0)
