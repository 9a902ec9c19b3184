"""What a run is about, whatever the pipeline: its networks, what the user asks of a generation, what is distilled.

Methods above this room (caches, quantizers, distillers, judges) take a pipeline and a `Run` and know neither a data set
nor a family: `Run` holds prompts, steps, guidance, sizes and every further argument of the pipeline's call, and
`denoisers` names the networks that take the steps. Training asks more, and a `Subject` answers it: a velocity network
with its identity, conditions, real samples, and how a student begins and ends.
"""

from diffusion_opt.subjects.class_conditional import ClassConditional
from diffusion_opt.subjects.conditions import UNCONDITIONAL, Classes, Conditions, Samples
from diffusion_opt.subjects.networks import denoisers
from diffusion_opt.subjects.prompted import PromptedPipeline
from diffusion_opt.subjects.run import Run
from diffusion_opt.subjects.subject import Beginning, Sampling, Subject

__all__ = [
    "UNCONDITIONAL",
    "Beginning",
    "ClassConditional",
    "Classes",
    "Conditions",
    "PromptedPipeline",
    "Run",
    "Samples",
    "Sampling",
    "Subject",
    "denoisers",
]
