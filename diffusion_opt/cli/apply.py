"""`diffusion-opt apply`: put a recipe on a pipeline and save what comes of it as a folder that opens by its name.

diffusion-opt apply fashion --recipe fast.json --out runs/fast
diffusion-opt generate runs/fast --prompts sneaker              # the recipe is on it
"""

from pathlib import Path

from diffusion_opt.cli.options import OPENING, Model, Opening


def apply(model: Model, recipe: Path, out: Path, opening: Opening = OPENING) -> None:
    """Open a pipeline, put a recipe on, and save it; `diffusion_opt.load` and every command open the folder.

    Calibrations and schedules that the recipe names go into the folder too. Quantized layers are packed.

    Args:
        model: shipped name, folder or hub name.
        recipe: JSON file of techniques, as `Recipe.save`, `search` or `advise` write it.
        out: the new folder.
    """
    opening.check(model)
    if not recipe.is_file():
        raise ValueError(f"--recipe {recipe} is not there")
    if out.exists():
        raise ValueError(f"--out {out} is there already: name a new folder")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    from diffusion_opt.quantization import PTQ, pack
    from diffusion_opt.recipes import Recipe, save

    techniques = Recipe.load(recipe)
    pipe = opening.open(model)
    techniques.apply(pipe)
    if any(isinstance(technique, PTQ) for technique in techniques.techniques):
        pack(pipe)
    save(pipe, out)
    print(f"{model} with {techniques.describe()}, written to {out}")
