"""Portraits as captioned pictures: what training asks of any data set that is asked for in words."""

from pathlib import Path

from diffusion_opt.datasets.captioned import CaptionedDataSet, CaptionedPictures
from diffusion_opt.datasets.portraits.picture_cache import pictures
from diffusion_opt.datasets.portraits.portrait import Split, sample
from diffusion_opt.datasets.portraits.prompts import partial_prompt


def captioned(count: int, seed: int, split: Split, cache: Path) -> CaptionedPictures:
    """The pictures of `sample(count, seed, split)`, with prompts that name a random part of each portrait."""
    portraits = sample(count, seed, split)
    return CaptionedPictures(
        pictures(count, seed, split, cache), lambda index, generator: partial_prompt(portraits[index], generator)[0]
    )


PORTRAITS = CaptionedDataSet("portraits", 128, captioned)
