"""What a search found, as a table, a picture of the front, and files: one JSON of everything, one of each recipe."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_opt.datasets.writing import write_json, written
from diffusion_opt.recipes.search import Found
from diffusion_opt.recipes.search.verdict import write_recipes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


def table(found: Found) -> "Table":
    """The survivors, the fastest last; whole at 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    view = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    judge, verdict = found.objective.judge, found.objective.verdict
    for name in ("recipe", "arithmetic", "time", "MB"):
        view.add_column(name, justify="left" if name == "recipe" else "right", no_wrap=name != "recipe")
    view.add_column(f"loss, {judge}\n(search)", justify="right")
    view.add_column(f"loss, {verdict}\n(held out)", justify="right")
    teacher = found.survivors[0].measured
    for one in found.survivors:
        searched = "" if one.search_loss is None else f"{one.search_loss:+.1%}"
        what = f"{one.name}: {one.recipe.describe()}"
        view.add_row(
            what, f"{teacher.macs / one.measured.macs:.1f}x", f"{one.seconds_faster:.1f}x",
            f"{one.measured.weight_bytes / 1e6:.1f}", searched, f"{one.loss:+.1%} (to {one.loss_high:+.1%})",
        )  # fmt: skip
    return view


def words(found: Found) -> list[str]:
    """The answer in sentences."""
    pick, tolerance, unit = found.pick, found.objective.tolerance, _unit(found)
    if not pick.recipe.techniques:
        return [f"no recipe stays within {tolerance:.0%} of the teacher by {found.objective.judge}: keep the teacher"]
    said = [
        f"the fastest within {tolerance:.0%} of the teacher by {found.objective.judge}: {pick.name}, "
        f"{pick.faster:.1f}x less {unit}: {pick.recipe.describe()}"
    ]
    verdict = f"{found.objective.verdict}, on {pick.measured.protocol.num_samples} samples of held-out noise, "
    if found.confirmed:
        return [*said, f"{verdict}agrees: {pick.loss:+.1%}"]
    other = found.fastest_confirmed
    said.append(f"{verdict}does not agree: {pick.loss:+.1%}")
    if other.recipe.techniques:
        said.append(
            f"the fastest that both put within it: {other.name}, {other.faster:.1f}x: {other.recipe.describe()}"
        )
        said.append("it was chosen by looking at the verdict: measure it again with another --seed")
    return said


def _unit(found: Found) -> str:
    return "arithmetic" if found.objective.cost == "macs" else "time"


def figure(found: Found) -> "Figure":
    """All trials, the front among them, and the survivors by the verdict of the other judge."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = page.subplots(1, 2)
    looked = [trial for trial in found.trials if "loss" in trial]
    key = "macs" if found.objective.cost == "macs" else "seconds"
    most = max(trial[key] for trial in looked)
    left.scatter([most / t[key] for t in looked], [100 * t["loss"] for t in looked], s=14, color="tab:gray")
    searched = [one for one in found.survivors if one.search_loss is not None]
    left.plot([one.faster for one in searched], [100 * one.search_loss for one in searched], "o", color="tab:blue")
    left.set_title(f"search: {len(looked)} trials, {found.budget.samples} samples each", fontsize=10)
    left.set_ylabel(f"loss by {found.objective.judge}, %")
    for one in found.survivors:
        color = "tab:orange" if one.search_loss is None else "tab:blue"
        bar = max(0.0, 100 * (one.loss_high - one.loss))
        right.errorbar(one.faster, 100 * one.loss, yerr=[[0], [bar]], fmt="o", color=color, capsize=3)
        right.annotate(one.name, (one.faster, 100 * one.loss), textcoords="offset points", xytext=(4, 4), fontsize=8)
    right.set_title(f"verdict: {found.budget.verdict_samples} samples of held-out noise", fontsize=10)
    right.set_ylabel(f"loss by {found.objective.verdict}, %")
    for axis in (left, right):
        axis.axhline(100 * found.objective.tolerance, linestyle=":", color="gray")
        axis.set(xscale="log", xlabel=f"times less {_unit(found)} than the teacher")
    return page


def as_dict(found: Found, command: str) -> dict[str, Any]:
    """Everything as plain data."""
    first = found.survivors[0].measured
    return {
        "command": command, "machine": first.machine, "pick": found.pick.name, "confirmed": found.confirmed,
        "objective": {"cost": found.objective.cost, "tolerance": found.objective.tolerance,
                      "judge": found.objective.judge, "verdict": found.objective.verdict},
        "samples": {"trial": found.budget.samples, "verdict": found.budget.verdict_samples},
        "survivors": [one.row() for one in found.survivors], "trials": list(found.trials),
        "not searched": dict(found.refused),
    }  # fmt: skip


def write(found: Found, folder: Path, command: str) -> None:
    """`search.json`, `front.png`, `pick.json` and a recipe for each survivor, to an existing folder."""
    write_json(folder / "search.json", as_dict(found, command))
    write_recipes([one for one in found.survivors if one.search_loss is not None], folder)
    found.pick.recipe.save(folder / "pick.json")
    picture = io.BytesIO()
    figure(found).savefig(picture, format="png", dpi=120)
    with written(folder / "front.png") as fresh:
        fresh.write_bytes(picture.getvalue())
