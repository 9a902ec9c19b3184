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
    from matplotlib.figure import Figure
    from rich.table import Table

COLUMNS = {
    "rung": lambda r: r["name"],
    "NFE": lambda r: f"{r['nfe']}",
    "ms/image": lambda r: f"{r['ms_per_image']:.2f}",
    "faster": lambda r: f"{r['speedup']:.1f}x",
    "MB": lambda r: f"{r['weight_mb']:.1f}",
    "FD": lambda r: f"{r['fid']:.1f} [{r['fid_low']:.1f}, {r['fid_high']:.1f}]",
    "agree": lambda r: f"{100 * r['class_agreement']:.1f} %",
    "recall": lambda r: f"{r['recall']:.2f}",
    "recipe": lambda r: r["recipe"],
}
TICKS = (1, 3, 10, 30, 100, 300)  # of the speed axis
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
    """A rich table with one line a rung."""
    from rich.table import Table

    view = Table(title=f"The ladder by {rows[0]['features']}: lower is better, real images {rows[0]['fid_floor']:.1f}")
    shown = {name: cell for name, cell in COLUMNS.items() if name not in ("recall", "recipe")}  # fits 80 columns
    for name in shown:
        view.add_column(name, justify="left" if name == "rung" else "right", no_wrap=True)
    for row in rows:
        view.add_row(*(cell(row) for cell in shown.values()))
    return view


def figure(result: LadderResult) -> "Figure":
    """Example images of each rung (same noise, same classes), and quality against speed."""
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
    axis = plot.subplots()
    for row in rows:
        spread = [[row["fid"] - row["fid_low"]], [row["fid_high"] - row["fid"]]]
        axis.errorbar(row["speedup"], row["fid"], yerr=spread, fmt="o", capsize=3)
        top = (row["speedup"], row["fid_high"])
        axis.annotate(row["name"], top, textcoords="offset points", xytext=(-2, 4), fontsize=9, rotation=30)
    axis.axhline(rows[0]["fid_floor"], linestyle=":", color="gray")
    axis.text(1, rows[0]["fid_floor"], " real images against real images", fontsize=8, color="gray", va="bottom")
    axis.set(xscale="log", xlabel="times faster than the teacher, per image", ylabel=rows[0]["features"])
    axis.set_xticks(TICKS, [f"{tick}x" for tick in TICKS])
    axis.set_xlim(0.8, 2.5 * max(row["speedup"] for row in rows))  # room for the last label
    axis.set_ylim(0, 1.3 * max(row["fid_high"] for row in rows))
    return page


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
<p>{html.escape(first["features"])} is the distance to real test images: {last["fid"]:.1f} against the teacher's
{first["fid"]:.1f}; real training images score {first["fid_floor"]:.1f}.</p>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<p><img alt="Example images of each rung, and quality against speed"
src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>
<p>Made by <code>{html.escape(report["command"])}</code></p>
<pre>{html.escape(facts)}</pre>
</body></html>
"""


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
