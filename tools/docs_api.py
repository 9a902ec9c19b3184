"""Pages of the package's public names, read from its source: nothing is imported, so heavy libraries stay out.

A public name is one in `__all__` of a folder's `__init__.py`. Its definition is followed through imports to the class,
function or value. The page shows signature with shapes, the fields of a dataclass with the comments that carry their
units, and the docstring, which is plain text with `names` in backticks: what is indented in it is shown as it stands.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path


def api_pages(package: Path) -> dict[str, str]:
    """One page for each room of `package`, with all its folders that have an `__all__`."""
    pages = {}
    for room in sorted(path.parent for path in package.glob("*/__init__.py")):
        sections = [section for folder in _folders(room) if (section := folder_section(folder, package))]
        if sections:
            pages[f"api/{room.name}.md"] = f"# {package.name}.{room.name}\n\n" + "\n\n".join(sections) + "\n"
    return pages


def _folders(room: Path) -> Iterator[Path]:
    yield from sorted(path.parent for path in room.rglob("__init__.py"))


def folder_section(folder: Path, package: Path) -> str:
    """The essay of a folder and its public names; empty for a folder without any."""
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    names = public_names(tree)
    if not names:
        return ""
    module = ".".join([package.name, *folder.relative_to(package).parts])
    parts = [f"## {module}", prose(ast.get_docstring(tree) or "")]
    parts += [entry for name in names if (entry := name_section(name, folder / "__init__.py", package))]
    return "\n\n".join(part for part in parts if part)


def public_names(tree: ast.Module) -> list[str]:
    """The strings of `__all__`, in order."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return [element.value for element in ast.walk(node.value) if isinstance(element, ast.Constant)]
    return []


def definition(name: str, file: Path, package: Path) -> tuple[ast.stmt, Path] | None:
    """The statement that makes `name` in `file` or where that imports it from, and its file; None if outside."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node, file
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return node, file
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            return node, file
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package.name}."):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _imported(node.module, alias.name, package)
    return None


def _imported(module: str, name: str, package: Path) -> tuple[ast.stmt, Path] | None:
    place = package.joinpath(*module.split(".")[1:])
    if (place / name / "__init__.py").exists() or (place / f"{name}.py").exists():
        return None  # a module, which has a page of its own or none
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return definition(name, file, package)


def name_section(name: str, file: Path, package: Path) -> str:
    """One public name: signature, fields, docstring and where it stands; empty for what the package does not define."""
    found = definition(name, file, package)
    if found is None:
        return ""
    node, source = found
    parts = [f"### {name}", f"```python\n{signature(node, source)}\n```"]
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        parts.append(prose(ast.get_docstring(node) or ""))
    parts.append(f"In `{source.relative_to(package.parent).as_posix()}`.")
    return "\n\n".join(part for part in parts if part)


def signature(node: ast.stmt, source: Path) -> str:
    """The head of a function, of a class with its fields and its public methods, or the beginning of a value."""
    lines = source.read_text(encoding="utf-8").splitlines()
    if isinstance(node, ast.FunctionDef):
        return _head(node, lines)
    if isinstance(node, ast.ClassDef):
        inner = [line for part in node.body for line in _member(part, lines)]
        return "\n".join([*(f"@{ast.unparse(mark)}" for mark in node.decorator_list), _head(node, lines), *inner])
    value = ast.get_source_segment("\n".join(lines), node) or ""
    shown = value.splitlines()[:12]
    return "\n".join([*shown, *(["    # …"] if len(value.splitlines()) > 12 else [])])


def _head(node: ast.FunctionDef | ast.ClassDef, lines: list[str]) -> str:
    """The lines from `def` or `class` to before the body, as they are written."""
    head = lines[node.lineno - 1 : max(node.lineno, node.body[0].lineno - 1)]
    return textwrap.dedent("\n".join(head)).rstrip()


def _member(part: ast.stmt, lines: list[str]) -> list[str]:
    if isinstance(part, ast.AnnAssign):
        return lines[part.lineno - 1 : part.end_lineno]
    if isinstance(part, ast.FunctionDef) and (not part.name.startswith("_") or part.name == "__call__"):
        marks = [f"    @{ast.unparse(mark)}" for mark in part.decorator_list]
        return ["", *marks, textwrap.indent(_head(part, lines), "    ") + " ..."]
    return []


def prose(docstring: str) -> str:
    """A docstring as Markdown: paragraphs with nothing marked up but `names`; what is indented stands as it is."""
    blocks = re.split(r"\n\s*\n", docstring)
    parts: list[str] = []
    for block in blocks:
        if re.match(r"\s{2,}", block):
            parts.append(f"```text\n{textwrap.dedent(block)}\n```")
        else:
            parts.append(_escaped(block))
    return "\n\n".join(part for part in parts if part.strip())


def _escaped(text: str) -> str:
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([*_<>$\[\]#{}~|\\^])", r"\\\1", p) for p in pieces)
