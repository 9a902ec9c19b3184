"""Put a trained pipeline into the repository, with a card that says how it was made and how good it is.

    python benchmarks/ship_model.py fashion runs/teacher-fashion "diffusion-opt train teacher" --guidance 2
    python benchmarks/ship_model.py fashion-4step runs/fashion-4step "diffusion-opt distill --steps 4"

The weights are rounded to half precision first and the rounded pipeline is what is measured. Every number of the card
comes from this run and is stored beside it in `benchmarks/results/model-<name>.json`.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro

from diffusion_opt.models import SHIPPED, load, ship
from diffusion_opt.recipes import measure

RESULTS = Path(__file__).parent / "results"
CARD = """# {name}

{summary}.

| | |
|---|---|
| network | stock `Flux2Transformer2DModel`, {parameters:.2f} M parameters, stored in half precision |
| trained on | {origin} |
| command | `{command}` |
| training | {steps:,} optimizer steps of {batch_size} images in {minutes:.0f} minutes (the last command), on {cpu} |
| sampling | network passes: {nfe}; steps: {sampling_steps}; guidance scale: {guidance:g} |
| {metric} | {distance:.2f} [{low:.2f}, {high:.2f}] at {samples:,} samples; real training images score {floor:.2f} |
| precision, recall | {precision:.3f}, {recall:.3f} |
| class agreement | {agreement:.1f} % (a shipped classifier sees the asked class) |
| license | Apache-2.0, as the repository; the training images are MIT-licensed |

Open it with `diffusion_opt.load("{name}")`, or any diffusers code can: `Flux2KleinPipeline.from_pretrained(folder,
text_encoder=None, tokenizer=None)`. Measured by `python benchmarks/ship_model.py`, stored in
`benchmarks/results/model-{name}.json`.
"""


def main(
    name: Annotated[str, tyro.conf.Positional],
    run: Annotated[Path, tyro.conf.Positional],
    command: Annotated[str, tyro.conf.Positional],
    guidance: float | None = None,
    samples: int = 2000,
    batch_size: int = 100,
) -> None:
    """Measure `run/pipeline` and ship it as `name`.

    Args:
        name: one of the names in diffusion_opt.models.SHIPPED.
        run: the training's working folder.
        command: the command (or commands) that made it, for the card.
        guidance: the guidance scale the pipeline gets as its default (teachers only).
        samples: images behind the quality figures.
        batch_size: images a call.
    """
    if name not in SHIPPED:
        raise SystemExit(f"{name!r} is not one of {', '.join(SHIPPED)}")
    model = SHIPPED[name]
    pipe = load(run / "pipeline")
    if guidance is not None:
        pipe.register_to_config(default_guidance=guidance)
    ship(pipe, model.folder, "measured below\n")
    pipe = load(name)
    pipe.set_progress_bar_config(disable=True)
    record = measure(pipe, num_samples=samples, batch_size=batch_size, rounds=1)
    state = json.loads((run / "checkpoint" / "state.json").read_text())
    quality, steps = record.quality, state["step"]
    card = CARD.format(
        name=name,
        summary=model.summary,
        parameters=sum(p.numel() for p in pipe.transformer.parameters()) / 1e6,
        origin=f"the teacher `{model.teacher}` alone, no images" if model.teacher else "Fashion-MNIST, 60,000 images",
        command=command,
        steps=steps,
        batch_size=state["config"]["batch_size"],
        minutes=state["seconds"] / 60,
        cpu=f"{record.machine['cores']} cores of {record.machine['cpu']}",
        nfe=record.nfe,
        sampling_steps=pipe.config.default_steps,
        guidance=pipe.config.default_guidance,
        metric=quality.metric,
        distance=quality.distance,
        low=quality.distance_low,
        high=quality.distance_high,
        samples=quality.num_samples,
        floor=quality.floor,
        precision=quality.precision,
        recall=quality.recall,
        agreement=100 * quality.class_agreement,
    )
    (model.folder / "README.md").write_text(card)
    RESULTS.mkdir(exist_ok=True)
    stored = {"training": state, **asdict(record)}
    (RESULTS / f"model-{name}.json").write_text(json.dumps(stored, indent=2) + "\n")
    print(card)


if __name__ == "__main__":
    tyro.cli(main)
