"""The large models that everyone asks about, by their configurations alone: no weights, no tokenizer, no network.

    from diffusion_opt.subjects import known
    pipe, run = known.skeleton("flux2-dev"), known.run("flux2-dev")

A JSON file here says which classes of diffusers a model is made of and with which settings; what it leaves out are the
defaults of those classes. `skeleton` builds them on torch's meta device, where tensors have shapes and no content. The
text encoder is not built: `encode_prompt` answers with embeddings of the right shape, and its parameters are a number
with its source. So the pipeline's own call can be made and counted (`subjects/plan.py`), and techniques can be tried
(`recipes/advice.py`), on any machine. Names are ours (`flux2-dev`) or the hub's (`black-forest-labs/FLUX.2-dev`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffusion_opt.names import KNOWN
from diffusion_opt.subjects.run import Run

FOLDER = Path(__file__).parent
MASKED = ("LTX2Pipeline",)  # whose texts come with masks


@dataclass(frozen=True, slots=True)
class Known:
    """A model by its configuration."""

    short: str
    name: str  # of the hub
    pipeline: str
    source: str
    settings: dict[str, Any]  # of the pipeline
    parts: dict[str, tuple[str, dict[str, Any]]]  # part -> class and what differs from its defaults
    text_encoder_parameters: tuple[int, str]  # and the configuration that was counted
    text: dict[str, int]  # tokens and width of the embeddings, and the layers whose embeddings are stacked
    run: dict[str, Any]  # how it is usually called


def find(name: str) -> Known:
    """A model by either name. Raises ValueError for another, listing those there are."""
    short = next((ours for ours, theirs in KNOWN.items() if name in (ours, theirs)), None)
    if short is None:
        raise ValueError(f"no configuration of {name!r} is shipped; there are {', '.join(KNOWN)}")
    stored = json.loads((FOLDER / f"{short}.json").read_text())
    parts = {part: (kind, settings) for part, (kind, settings) in stored.pop("parts").items()}
    counted = tuple(stored.pop("text_encoder_parameters"))
    return Known(short=short, parts=parts, text_encoder_parameters=counted, **stored)


def run(name: str, prompts: tuple[str, ...] = ("a prompt",), **settings: Any) -> Run:
    """The usual call of a model; `settings` that are not None take the place of its own."""
    said = {key: value for key, value in settings.items() if value is not None}
    return Run(prompts, **{**find(name).run, **said})


def skeleton(name: str) -> DiffusionPipeline:
    """The pipeline on the meta device, whose texts are embeddings without content."""
    known = find(name)
    kind = getattr(diffusers, known.pipeline)
    parts = {part: _part(*about) for part, about in known.parts.items()}
    pipe = kind(tokenizer=None, text_encoder=None, **parts, **known.settings)
    pipe.set_progress_bar_config(disable=True)
    pipe.encode_prompt = _Texts(pipe, known)
    return pipe


def _part(kind: str, settings: dict[str, Any]) -> Any:
    found = getattr(diffusers, kind, None) or _of_pipelines(kind)
    if not issubclass(found, nn.Module):
        return found(**settings)
    with torch.device("meta"):
        return found(**settings).eval()


def _of_pipelines(kind: str) -> type:
    """A class that diffusers keeps beside its pipelines."""
    from diffusers.pipelines import ltx2

    return getattr(ltx2, kind)


class _Texts:
    """In the place of `encode_prompt`: embeddings of the right shape, with and without the prompt."""

    def __init__(self, pipe: DiffusionPipeline, known: Known) -> None:
        self.known, self.pipe = known, pipe

    def __call__(self, prompt: str | list[str] | None = None, *_: Any, **settings: Any) -> tuple[Any, ...]:
        tokens, width = self.known.text["tokens"], self.known.text["width"]
        rows = 1 if isinstance(prompt, str) or prompt is None else len(prompt)
        embedded = torch.empty(rows, tokens, width, device="meta")
        if self.known.pipeline.startswith("Flux2"):
            return embedded, torch.zeros(rows, tokens, 4)
        negative = embedded if settings.get("do_classifier_free_guidance", True) else None
        if self.known.pipeline not in MASKED:
            return embedded, negative
        layers = self.known.text.get("layers", 1)
        stacked = torch.empty(rows, tokens, width * layers, device="meta")
        mask: Tensor = torch.ones(rows, tokens, dtype=torch.long)
        return stacked, mask, stacked, mask
