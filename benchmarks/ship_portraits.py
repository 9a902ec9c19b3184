"""Put the text-to-image model of portraits into the repository, with a card and the figures behind it.

    python benchmarks/ship_portraits.py runs/teacher-portraits-2 --before runs/teacher-portraits

The pipeline is rounded to half precision first, and the rounded one is measured: what the decoder keeps of pictures it
has not seen, how close the pictures of prompts that name everything come to the one asked for (each has a pair of style
and color that was never trained together), and where the time of a call goes. The pixel distance judges no
attribute and no variety. All numbers go to `benchmarks/results/model-portraits.json`.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import tyro
from diffusers import Flux2KleinPipeline
from PIL import Image
from torch import Tensor

from diffusion_opt.datasets import write_sums, write_text
from diffusion_opt.datasets.portraits import draw_many, prompt, sample
from diffusion_opt.evaluation.machine import machine
from diffusion_opt.models import SHIPPED, load, ship
from diffusion_opt.models.patch_latents import pixels, taken_from

NAME = "portraits"
HERE = Path(__file__).parent
CARD = """# portraits

**Unfinished**: the teacher saw {images:,} pictures in {minutes:.0f} minutes of wall time, beside other work, and was
still learning. By eye, style and faces follow the prompt, while backgrounds are often wrong and hair is ragged.
Most of its training had times at shift 1, so the noisiest ones, where large areas are decided, were hardly seen; the
last {last:,} steps were at shift 3, and more of them is what it needs. Training can be resumed by

    diffusion-opt train teacher --model portraits --start portraits --out runs/teacher-portraits-3

which goes on from these averaged weights, with their words and latents, and a new optimizer; and, for the decoder, by
`diffusion-opt train autoencoder --model portraits --start portraits --out runs/autoencoder-portraits-2`.

Portraits of 128 x 128 pixels in seven styles, asked for in words: a stock `Flux2KleinPipeline` with a small
`Flux2Transformer2DModel` ({transformer:.2f} M parameters, 64 tokens), `Qwen3ForCausalLM` ({text:.2f} M) and
`AutoencoderKLFlux2` (decoder {decoder:.2f} M; the encoder is a closed-form linear map).

| | |
|---|---|
| data | {pictures:,} pictures of `data/portraits`, whose card has the licenses; prompts worded anew each time |
| decoder | `diffusion-opt train autoencoder --model portraits --minutes 45 --learning-rate 0.0015` |
| teacher | `diffusion-opt train teacher --model portraits --minutes 64`, at shift 1 as it then was |
| | `diffusion-opt train teacher --model portraits --start portraits --minutes 32 --learning-rate 8e-4` |
| training | teacher {steps:,} steps of 32 in float32, decoder {decoder_steps:,} steps of 8 crops |
| machine | one thread for each of {cpu}, shared with other work |
| autoencoder | {psnr:.1f} dB PSNR on {unseen} unseen pictures; linear decoding of the same latents {linear:.1f} dB |
| call | 50 steps, guidance {guidance:g}, as `call.json` says |
| held-out prompts | name everything: for {nearest:.0f} % of {samples} the asked picture is nearest of {gallery} |
| distance in pixels | {asked:.1f} dB PSNR to the asked picture; the nearest other one of the gallery {other:.1f} dB |
| time, one picture | text {text_ms:.0f} ms, passes {passes_ms:,.0f} ms, decoder {decode_ms:.0f} ms on one thread |
| license | Apache-2.0, as the repository |

Open it with `diffusion_opt.load("portraits")` and call `pipe(prompt="a punk with green hair")`. Any diffusers code can:
`Flux2KleinPipeline.from_pretrained(folder)`, called with the arguments in `call.json`. Measured by
`python benchmarks/ship_portraits.py`, stored in `benchmarks/results/model-portraits.json`.
"""


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """In dB, of pictures in [-1, 1], over the last three dimensions."""
    return 10 * torch.log10(4 / (one - other).square().mean((-3, -2, -1)))


@torch.no_grad()
def autoencoder(pipe: Flux2KleinPipeline, number: int) -> dict[str, float]:
    """What the decoder and the linear one keep of unseen pictures."""
    x, pca = pixels(draw_many(sample(number, 1, "test"))), taken_from(pipe.vae)
    latents = pipe.vae.encode(x).latent_dist.mode()
    decoded, linear = pipe.vae.decode(latents).sample.clamp(-1, 1), pca.decode(latents).clamp(-1, 1)
    return {"psnr": psnr(decoded, x).mean().item(), "linear": psnr(linear, x).mean().item(), "unseen": number}


def held_out(pipe: Flux2KleinPipeline, number: int, gallery: int) -> tuple[dict[str, float], Tensor, list[str]]:
    """How close pictures of held-out prompts come to the asked one, among others of the same split."""
    portraits = sample(gallery, 0, "held_out")
    asked = portraits[:number]
    texts = [prompt(one, frozenset(one.attributes()) | {"style"}) for one in asked]
    made = [
        pipe(prompt=texts[i : i + 16], generator=torch.Generator().manual_seed(i), output_type="pt").images * 2 - 1
        for i in range(0, number, 16)
    ]
    made, real = torch.cat(made), pixels(draw_many(portraits))
    table = torch.stack([psnr(one[None], real) for one in made])
    mine = table[torch.arange(number), torch.arange(number)]
    table[torch.arange(number), torch.arange(number)] = -torch.inf
    others = table.amax(1)
    found = {"nearest": 100 * (mine > others).float().mean().item(), "asked": mine.mean().item()}
    found |= {"other": others.mean().item(), "samples": number, "gallery": gallery}
    return found, torch.stack([made, real[:number]], 1), texts


@torch.no_grad()
def times(pipe: Flux2KleinPipeline, rounds: int = 3) -> dict[str, float]:
    """Milliseconds of CPU time of the parts of a call for one picture, the median of some calls."""
    taken: dict[str, list[float]] = {"text_ms": [], "passes_ms": [], "decode_ms": []}
    for _ in range(rounds):
        start = time.process_time()
        text, _ = pipe.encode_prompt(
            "a punk with green hair", max_sequence_length=28, text_encoder_out_layers=(1, 2, 3)
        )
        pipe.encode_prompt("", max_sequence_length=28, text_encoder_out_layers=(1, 2, 3))
        encoded = time.process_time()
        latents = pipe(prompt_embeds=text, negative_prompt_embeds=text, output_type="latent").images
        passed = time.process_time()
        pipe.vae.decode(latents)
        marks = (start, encoded, passed, time.process_time())
        for name, one, two in zip(taken, marks, marks[1:], strict=False):
            taken[name].append(1000 * (two - one))
    return {name: sorted(values)[rounds // 2] for name, values in taken.items()}


def sheet(pairs: Tensor, path: Path, columns: int = 8) -> None:
    """Made and asked pictures side by side, as a PNG."""
    pairs = pairs[: len(pairs) // columns * columns]
    rows = pairs.unflatten(0, (-1, columns)).permute(0, 2, 4, 1, 5, 3).flatten(0, 2).flatten(1, 2)
    Image.fromarray(((rows + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()).save(path)


def last(folder: Path) -> dict[str, float]:
    """The last line of a run's log."""
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def main(
    run: Annotated[Path, tyro.conf.Positional],
    before: tuple[Path, ...] = (),
    decoder_run: Path = Path("runs/autoencoder-portraits"),
    samples: int = 48,
    gallery: int = 500,
    unseen: int = 100,
    out: Path = Path("runs/portraits-sheet.png"),
) -> None:
    """Measure `run/pipeline` and ship it.

    Args:
        run: the teacher's working folder.
        before: those of the runs that it went on from.
        decoder_run: that of the autoencoder.
        samples: prompts of held-out portraits.
        gallery: portraits among which the asked one is looked for.
        unseen: pictures for the autoencoder.
        out: contact sheet of made and asked pictures, in pairs of rows.
    """
    folder = SHIPPED[NAME].folder
    ship(load(run / "pipeline", dtype="float32"), folder, "measured below\n")
    pipe = load(NAME)
    pipe.set_progress_bar_config(disable=True)
    record = autoencoder(pipe, unseen) | times(pipe)
    quality, pairs, texts = held_out(pipe, samples, gallery)
    sheet(pairs, out)
    print("\n".join(texts[:16]))
    teachers, decoder = [last(one) for one in (*before, run)], last(decoder_run)
    steps = sum(one["step"] for one in teachers)
    millions = {
        "transformer": pipe.transformer, "text": pipe.text_encoder.model, "decoder": pipe.vae.decoder,
    }  # fmt: skip
    record |= quality | {n: sum(p.numel() for p in part.parameters()) / 1e6 for n, part in millions.items()}
    record |= {"steps": steps, "images": 32 * steps, "minutes": sum(one["seconds"] for one in teachers) / 60}
    record |= {"last": teachers[-1]["step"]}
    record |= {"decoder_steps": decoder["step"], "pictures": 24_000, "guidance": 3.0}
    record |= {"cpu": machine()["cpu"]}
    (HERE / "results" / f"model-{NAME}.json").write_text(json.dumps(record, indent=2) + "\n")
    write_text(folder / "README.md", CARD.format(**record))
    write_sums(folder)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
