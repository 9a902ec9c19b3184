"""The networks of a pipeline that take the denoising steps.

Most diffusers pipelines have one, `transformer`. Wan 2.2 A14B has two, `transformer` for the noisy steps and
`transformer_2` for the rest, so a technique that looks at `pipe.transformer` alone would change one half of a
generation. Pipelines of the first generation have a `unet`, which no technique of this package serves.
"""

from diffusers import DiffusionPipeline
from torch import nn

NAMES = ("transformer", "transformer_2")


def denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The denoising transformers by component name, in the order in which the steps use them.

    Raises ValueError for a pipeline without one, and says whether it has a UNet instead.
    """
    found = {name: part for name in NAMES if (part := getattr(pipe, name, None)) is not None}
    if not found:
        kind = type(pipe).__name__
        if getattr(pipe, "unet", None) is not None:
            raise ValueError(
                f"{kind} denoises with a UNet, and the techniques of this package act on diffusion transformers: "
                "use a pipeline with a transformer, such as FLUX.2, SD3, Wan or LTX-2"
            )
        raise ValueError(f"{kind} has no transformer that denoises, so there is nothing to act on")
    return found
