"""What a run is about, whatever the pipeline: its networks, and what the user asks of a generation.

Methods above this room (caches, quantizers, distillers, judges) take a pipeline and a `Run` and know neither a data set
nor a family: `Run` holds prompts, steps, guidance, sizes and every further argument of the pipeline's call, and
`denoisers` names the networks that take the steps.
"""

from diffusion_opt.subjects.networks import denoisers
from diffusion_opt.subjects.run import Run

__all__ = ["Run", "denoisers"]
