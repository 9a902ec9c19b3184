"""The ladder's report in four forms: a table for the terminal, JSON for programs, a picture and a page for people."""

import base64
import html
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusion_opt.datasets.writing import write_json, write_text, written
from diffusion_opt.recipes.ladder import TEACHER, LadderResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table


def spread(number: dict[str, Any]) -> str:
    """A number with half the width of its 95 % interval, both with a decimal below 100."""
    digits = 0 if number["value"] >= 100 else 1
    return f"{number['value']:.{digits}f} ±{(number['high'] - number['low']) / 2:.{digits}f}"


COLUMNS = {
    "rung": lambda r: r["name"],
    "NFE": lambda r: f"{r['nfe']}",
    "ms per\nimage": lambda r: f"{r['ms_per_image']:.1f}",
    "faster": lambda r: f"{r['speedup']:.0f}x" if r["speedup"] >= 10 else f"{r['speedup']:.1f}x",
    "MB": lambda r: f"{r['weight_mb']:.1f}" if r["weight_mb"] < 100 else f"{r['weight_mb']:.0f}",
    "FD\nfashion": lambda r: spread(r["judged"]["fashion.distance"]),
    "FD\nImageNet": lambda r: f"{r['judged']['imagenet.distance']['value']:.0f}",
    "re-\ncall": lambda r: f"{r['judged']['imagenet.recall']['value']:.2f}",
    "TV": lambda r: f"{r['judged']['statistics.total_variation']['value']:.2f}",
    "FD ImageNet, interval": lambda r: spread(r["judged"]["imagenet.distance"]),
    "high frequencies": lambda r: f"{r['judged']['statistics.high_frequency']['value']:.2f}",
    "class agreement": lambda r: f"{100 * r['class_agreement']:.1f} %",
    "recall, fashion": lambda r: f"{r['recall']:.2f}",
    "recipe": lambda r: r["recipe"],
}
SHOWN = tuple(COLUMNS)[:9]  # in a terminal of 80 columns; the page has them all
TICKS = (1, 3, 10, 30, 100, 300)  # of the speed axis
PLOTTED = {"fashion.distance": "FD (fashion features)", "imagenet.distance": "FD (ImageNet features)"}
EXAMPLES = 20  # images shown of each rung, two a class


def as_dict(result: LadderResult, command: str) -> dict[str, Any]:
    """The report as plain data: `rungs` (the teacher first), the machine, the protocol and what was left out."""
    teacher = result.measurements[TEACHER]
    protocol = teacher.protocol
    return {
        "rungs": result.rows(),
        "skipped": result.skipped,
        "command": command,
        "machine": teacher.machine,
        "protocol": {
            "samples": protocol.num_samples,
            "batch_size": protocol.batch_size,
            "seed": protocol.seed,
            "threads": protocol.threads,
            "device": protocol.device,
        },
    }


def table(rows: list[dict[str, Any]]) -> "Table":
    """A rich table with one line a rung, whole at 80 columns: the judges side by side."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    view = Table(title=f"The ladder. {floors(rows)}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in SHOWN:
        view.add_column(name, justify="left" if name == "rung" else "right", no_wrap=True)
    for row in rows:
        view.add_row(*(COLUMNS[name](row) for name in SHOWN))
    return view


def floors(rows: list[dict[str, Any]]) -> str:
    """How the distances are read: what as many real pictures get by each judge, where that is known."""
    numbers = rows[0]["judged"]
    titles = {"fashion.distance": "fashion", "imagenet.distance": "ImageNet"}
    known = [f"{titles[name]} {numbers[name]['real']:.3g}" for name in titles if numbers[name]["real"] is not None]
    of_real = f"; real pictures get {', '.join(known)}" if known else ""
    return f"FD by two judges: lower is better{of_real}. TV, total variation: 1 is that of real pictures."


def figure(result: LadderResult) -> "Figure":
    """Example images of each rung (same noise, same classes), and the distance by either judge against speed."""
    from matplotlib.figure import Figure

    rows = result.rows()
    page = Figure(figsize=(11, 0.62 * len(rows) + 4.4), layout="constrained")
    grids, plot = page.subfigures(2, 1, height_ratios=[0.62 * len(rows) + 0.4, 4])
    axes = grids.subplots(len(rows), 1)
    for axis, row in zip(axes, rows, strict=True):
        strip = torch.cat(list(result.images[row["name"]][:EXAMPLES, 0]), dim=1)
        axis.imshow(-strip.numpy(), cmap="gray", vmin=-1, vmax=1)
        axis.set_axis_off()
        axis.set_title(f"{row['name']}  {row['speedup']:.0f}x", loc="left", fontsize=9, pad=2)
    for axis, judge, title in zip(plot.subplots(1, 2), PLOTTED, PLOTTED.values(), strict=True):
        _against_speed(axis, rows, judge, title)
    return page


def _against_speed(axis: "Axes", rows: list[dict[str, Any]], judge: str, title: str) -> None:
    """The distance of one judge over the speed-up, with the interval, and what real pictures get as a dotted line."""
    for row in rows:
        number = row["judged"][judge]
        bars = [[number["value"] - number["low"]], [number["high"] - number["value"]]]
        axis.errorbar(row["speedup"], number["value"], yerr=bars, fmt="o", capsize=3)
        top = (row["speedup"], number["high"])
        axis.annotate(row["name"], top, textcoords="offset points", xytext=(-2, 4), fontsize=8, rotation=35)
    if (real := rows[0]["judged"][judge]["real"]) is not None:
        axis.axhline(real, linestyle=":", color="gray")
        axis.text(1, real, " real pictures against real ones", fontsize=8, color="gray", va="bottom")
    axis.set(xscale="log", xlabel="times faster than the teacher, per image", ylabel=title)
    axis.set_xticks(TICKS, [f"{tick}x" for tick in TICKS])
    axis.set_xlim(0.8, 3 * max(row["speedup"] for row in rows))  # room for the last label
    axis.set_ylim(0, 1.4 * max(row["judged"][judge]["high"] for row in rows))


def page(report: dict[str, Any], picture: bytes) -> str:
    """A self-contained HTML page: the table, the picture, the machine."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell(row))}</td>" for cell in COLUMNS.values()) + "</tr>"
        for row in report["rungs"]
    )
    facts = json.dumps({key: report[key] for key in ("protocol", "machine", "skipped")}, indent=2)
    first, last = report["rungs"][0], report["rungs"][-1]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>diffusion_opt: the ladder</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.9rem }}
th, td {{ padding: 0.3rem 0.5rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }}
th:first-child, td:first-child, th:last-child, td:last-child {{ text-align: left; white-space: normal }}
img {{ max-width: 100% }} pre {{ background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 0.8rem }}
</style></head><body>
<h1>The ladder</h1>
<p>{html.escape(last["name"])}: <strong>{last["speedup"]:.0f}x</strong> faster per image than the teacher
({html.escape(first["recipe"])}), measured in one run with the rungs taking turns.</p>
<p>{html.escape(floors(report["rungs"]))} {html.escape(last["name"])}: {_distances(last)}; the teacher:
{_distances(first)}.</p>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<p><img alt="Example images of each rung, and quality against speed"
src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>
<p>Made by <code>{html.escape(report["command"])}</code></p>
<pre>{html.escape(facts)}</pre>
</body></html>
"""


def _distances(row: dict[str, Any]) -> str:
    """Both distances of a rung in words."""
    return ", ".join(f"{row['judged'][judge]['value']:.3g} {html.escape(title)}" for judge, title in PLOTTED.items())


def write(result: LadderResult, folder: Path, command: str) -> dict[str, Any]:
    """Write `report.json`, `ladder.png` and `report.html` to an existing folder; returns the report's data."""
    report = as_dict(result, command)
    write_json(folder / "report.json", report)
    picture = io.BytesIO()
    figure(result).savefig(picture, format="png", dpi=130)
    with written(folder / "ladder.png") as fresh:
        fresh.write_bytes(picture.getvalue())
    write_text(folder / "report.html", page(report, picture.getvalue()))
    return report
