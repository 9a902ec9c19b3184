"""Run, clean and check the notebooks of the course.

    python tools/notebooks.py                     the same as refresh
    python tools/notebooks.py refresh [names]     execute in full size, each in its own folder, and store clean outputs
    python tools/notebooks.py check [names]       validate what is stored, without running anything
    python tools/notebooks.py clean [names]       drop widgets, timestamps and machine facts from stored outputs
    python tools/notebooks.py strip [names]       drop all outputs

A name is a file or its beginning ("02"); without names all notebooks are meant. `refresh` writes a notebook only when
all of it ran without an error, errors inside widgets included: ipywidgets catches an exception in a callback, so the
kernel says nothing and only the saved state of the widgets tells. `clean` keeps ids, counts, text and pictures
(nbstripout --keep-output --keep-count --keep-id) and drops what is dead or different at each run: views of widgets,
the widgets' state, execution times, language version.
"""

import argparse
import ast
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}

MOST_BYTES = 600_000
CELLS = (24, 52)
MOST_CODE_LINES = 275
MOST_FUNCTION_LINES = 25
MOST_CLASS_LINES = 15
SECTIONS = ("## Recap", "## Limits", "## Sources", "## Next")
CELL_SECONDS = 600  # a single cell that takes longer is stuck


class NotebookError(Exception):
    """What is wrong with a notebook and where, in one line."""


def choose(names: list[str], folder: Path = FOLDER) -> list[Path]:
    """The notebooks that `names` mean, all of them for no names. Raises NotebookError for a name that means none."""
    every = sorted(folder.glob("*.ipynb"))
    chosen = []
    for name in names or [""]:
        found = [path for path in every if path.name.startswith(Path(name).name)]
        if not found:
            raise NotebookError(f"no notebook begins with {name!r}; there are {', '.join(p.stem for p in every)}")
        chosen += found
    return sorted(set(chosen))


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def write(notebook: NotebookNode, path: Path) -> None:
    """Validate, then replace the file in one move, so that an interruption leaves the old one."""
    nbformat.validate(notebook)
    partial = path.with_suffix(".partial")
    nbformat.write(notebook, partial)
    partial.replace(path)


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in a fresh kernel with `folder` as its working directory, in full size and without a network.

    Raises NotebookError for an exception in a cell or in a callback of a widget.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    environment = {name: value for name, value in os.environ.items() if name != "DIFFUSION_OPT_FAST"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    options = {"timeout": CELL_SECONDS, "kernel_name": KERNEL["name"]}
    client = NotebookClient(notebook, **options, store_widget_state=True, coalesce_streams=True)
    try:
        client.execute(cwd=str(folder), env=environment)
    except CellExecutionError as error:
        raise NotebookError(f"a cell failed: {error.ename}: {error.evalue}") from error
    if errors := widget_errors(notebook):
        raise NotebookError(f"a callback of a widget failed: {errors[0]}")


def widget_errors(notebook: NotebookNode) -> list[str]:
    """Exceptions that widgets caught: error outputs in the saved state of the notebook's Output widgets."""
    state = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    outputs = [
        output
        for model in state.values()
        if model.get("model_name") == "OutputModel"
        for output in model.get("state", {}).get("outputs", [])
    ]
    return [f"{o['ename']}: {o['evalue']}" for o in outputs if o.get("output_type") == "error"]


def clean(notebook: NotebookNode) -> None:
    """Keep ids, counts, text and pictures; drop what is dead or different at each run."""
    notebook.metadata = NotebookNode(kernelspec=NotebookNode(KERNEL), language_info=NotebookNode(name="python"))
    for cell in notebook.cells:
        cell.metadata = NotebookNode({key: value for key, value in cell.metadata.items() if key == "tags"})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_view(output)]
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata = NotebookNode()


def is_view(output: NotebookNode) -> bool:
    """Whether an output is a live widget: on reopening it would only say that its model is gone."""
    return WIDGET_VIEW in output.get("data", {})


def strip(notebook: NotebookNode) -> None:
    """Drop all outputs and counts."""
    clean(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def problems(path: Path) -> list[str]:
    """All that is wrong with a stored notebook; empty if it is as the course wants it."""
    try:
        notebook = read(path)
        nbformat.validate(notebook)
    except (nbformat.ValidationError, nbformat.reader.NotJSONError) as error:
        return [f"not a valid notebook: {str(error).splitlines()[0]}"]
    found = [*check_cells(notebook), *check_outputs(notebook), *check_code(notebook), *check_text(notebook)]
    if (size := path.stat().st_size) > MOST_BYTES:
        found.append(f"{size:,} bytes; at most {MOST_BYTES:,}: fewer or smaller figures")
    if (notebook.nbformat, notebook.nbformat_minor) < (4, 5):
        found.append(f"format {notebook.nbformat}.{notebook.nbformat_minor} has no cell ids; save it as 4.5")
    return found


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def check_cells(notebook: NotebookNode) -> Iterator[str]:
    """Number of cells, and ids that are words: ids made by an editor change whenever a cell is made anew."""
    if not CELLS[0] <= len(notebook.cells) <= CELLS[1]:
        yield f"{len(notebook.cells)} cells; a lesson has {CELLS[0]} to {CELLS[1]}"
    ids = [cell.get("id", "") for cell in notebook.cells]
    for name in ids:
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]+)?", name):
            yield f"cell id {name!r}; use words with hyphens, such as 'euler-by-hand'"
    for name in sorted({name for name in ids if ids.count(name) > 1}):
        yield f"cell id {name!r} occurs twice"


def check_outputs(notebook: NotebookNode) -> Iterator[str]:
    """Executed from top to bottom and clean, or not at all."""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if any(counts) and counts != list(range(1, len(counts) + 1)):
        yield f"executed in part or out of order (counts {counts}): refresh or strip it"
    if not any(counts) and any(cell.outputs for cell in code_cells(notebook)):
        yield "outputs without execution counts: refresh or strip it"
    if set(notebook.metadata) - {"kernelspec", "language_info"}:
        yield f"metadata {sorted(set(notebook.metadata) - {'kernelspec', 'language_info'})}: clean it"
    for cell in notebook.cells:
        if set(cell.metadata) - {"tags"}:
            yield f"cell {cell.id}: metadata {sorted(cell.metadata)}: clean it"
        if {"raises-exception", "skip-execution"} & set(cell.metadata.get("tags", [])):
            yield f"cell {cell.id}: a tag hides failures from the tests"
        for output in cell.get("outputs", []):
            yield from (f"cell {cell.id}: {problem}" for problem in check_output(output))


def check_output(output: NotebookNode) -> Iterator[str]:
    """One stored output: no error, no warning, no dead widget, no memory address."""
    if output.output_type == "error":
        yield f"stored error {output.ename}: {output.evalue}"
    if output.get("name") == "stderr":
        yield f"writes to stderr: {output.text.strip().splitlines()[-1]}"
    if is_view(output):
        yield "a live widget is stored: clean it"
    text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
    if re.search(r"\bat 0x[0-9a-f]+", text):
        yield "shows an object's address, which differs at each run: end the cell with a figure or a value"


def check_code(notebook: NotebookNode) -> Iterator[str]:
    """Code that reads as a lesson: imports in one cell, short, no shell, no paths, each function defined once."""
    sources = {cell.id: cell.source for cell in code_cells(notebook)}
    lines = sum(bool(line.strip()) for source in sources.values() for line in source.splitlines())
    if lines > MOST_CODE_LINES:
        yield f"{lines} lines of code; at most {MOST_CODE_LINES}: move what is no lesson into the package"
    defined: set[str] = set()
    for i, (name, source) in enumerate(sources.items()):
        if re.search(r"^\s*[!%]", source, flags=re.MULTILINE):
            yield f"cell {name}: a shell line or a magic; notebooks install nothing and set nothing up"
            continue
        for node in ast.walk(ast.parse(source)):
            for problem in check_node(node, first=i == 0, defined=defined):
                yield f"cell {name}: {problem}"


def check_node(node: ast.AST, first: bool, defined: set[str]) -> Iterator[str]:
    """Rules for one node of the syntax; `defined` collects the names of functions and classes seen so far."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]
        if not first:
            yield f"imports {modules[0]}; all imports stand in the first code cell"
        if any(module.partition(".")[0] in ("matplotlib", "sys", "os", "subprocess") for module in modules):
            yield f"imports {modules[0]}; figures come from diffusion_opt.lesson.plots, settings from its settings"
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and is_relative_path(node.value):
        yield f"the path {node.value!r}; ask the package, it knows where its data lies"
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        length, most = node.end_lineno - node.lineno + 1, MOST_FUNCTION_LINES
        if isinstance(node, ast.ClassDef):
            most = MOST_CLASS_LINES
        if length > most:
            yield f"{node.name} has {length} lines; at most {most}"
        if node.name in defined:
            yield f"{node.name} is defined twice"
        defined.add(node.name)


def is_relative_path(text: str) -> bool:
    return bool(re.match(r"(\.{1,2}/|(data|runs|notebooks|benchmarks)/)", text))


def check_text(notebook: NotebookNode) -> Iterator[str]:
    """The frame of a lesson: title with minutes and aims on top; recap, limits, sources and next at the end."""
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    top = text[0] if text else ""
    if not top.startswith("# ") or notebook.cells[0].cell_type != "markdown":
        yield "the first cell must be Markdown and begin with the title, '# …'"
    for words in ("minute", "You will be able to"):
        if words not in top:
            yield f"the first cell does not say {words!r}"
    headings = [line for source in text for line in source.splitlines() if line.startswith("#")]
    for section in SECTIONS:
        if section not in headings:
            yield f"no section {section!r}"
    if sum(heading.startswith("# ") for heading in headings) > 1:
        yield "more than one title: sections begin with '##'"


def refresh(path: Path) -> None:
    """Execute one notebook from its stripped state and store it clean. Raises NotebookError."""
    notebook = read(path)
    strip(notebook)
    execute(notebook, path.parent)
    clean(notebook)
    write(notebook, path)


def rewrite(path: Path, change) -> None:
    notebook = read(path)
    change(notebook)
    write(notebook, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="?", default="refresh", choices=["refresh", "check", "clean", "strip"])
    parser.add_argument("names", nargs="*", help="notebooks, or their beginnings; all without names")
    options = parser.parse_args(arguments)
    failed = False
    try:
        paths = choose(options.names)
    except NotebookError as error:
        parser.error(str(error))
    for path in paths:
        began = time.monotonic()
        try:
            if options.command == "refresh":
                refresh(path)
            elif options.command != "check":
                rewrite(path, {"clean": clean, "strip": strip}[options.command])
            found = [] if options.command in ("clean", "strip") else problems(path)
        except NotebookError as error:
            found = [str(error)]
        failed |= bool(found)
        seconds = f"  ({time.monotonic() - began:.0f} s)" if options.command == "refresh" else ""
        print(f"{path.name}: {'; '.join(found) or 'fine'}{seconds}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
