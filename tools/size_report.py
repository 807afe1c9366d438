"""The shape of the tree: sizes, docs, annotations and what product code must not contain.

usage: size_report.py [--gate]      with --gate, a breach makes the exit status 1

Standard library only.  `zinfer/` is held to every rule, `tools/` to sizes and types, `benchmarks/` to sizes;
`tests/` are counted.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MIN_CLASS_DOCS = 0.80
NAMELESS = {"utils", "util", "common", "helpers", "helper", "misc"}
READS_ENVIRONMENT = PurePosixPath("zinfer/config/load.py")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Shape:
    """What one source text measures; `breaches` are lines a reader can click on."""

    lines: int = 0
    functions: list[int] = field(default_factory=list)
    classes: int = 0
    class_docs: int = 0
    slots: int = 0  # arguments and returns that can carry a type
    typed: int = 0
    breaches: list[str] = field(default_factory=list)


def measure(path: PurePosixPath, text: str) -> Shape:
    """Measure one file.  `path` is relative to the repository and decides which rules hold."""
    shape = Shape(lines=len(text.splitlines()))
    tree = ast.parse(text)
    for line, what in sizes(shape, tree):
        shape.breaches.append(f"{path}:{line}: {what}")
    if path.parts[0] == "zinfer":
        for line, what in product(path, tree, text):
            shape.breaches.append(f"{path}:{line}: {what}")
    if path.parts[0] in {"zinfer", "tools"}:
        for line, what in typing(shape, tree):
            shape.breaches.append(f"{path}:{line}: {what}")
    return shape


def sizes(shape: Shape, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Count lines and class docstrings into `shape`; yield what is too long."""
    if shape.lines > MAX_FILE_LINES:
        yield 1, f"{shape.lines} lines, the limit is {MAX_FILE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, Function):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            shape.functions.append(length)
            if length > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {length} lines, the limit is {MAX_FUNCTION_LINES}"
        elif isinstance(node, ast.ClassDef):
            shape.classes += 1
            shape.class_docs += ast.get_docstring(node) is not None


def typing(shape: Shape, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Count what is typed into `shape`; yield every function with an argument or a result that is not."""
    methods = {
        id(node)
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, Function) and "staticmethod" not in map(ast.unparse, node.decorator_list)
    }
    for node in ast.walk(tree):
        if not isinstance(node, Function):
            continue
        args = [*node.args.posonlyargs, *node.args.args][id(node) in methods :]
        args += [*node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
        untyped = [arg.arg for arg in args if arg.annotation is None]
        untyped += ["return"] if node.returns is None else []
        shape.slots += len(args) + 1
        shape.typed += len(args) + 1 - len(untyped)
        if untyped:
            yield node.lineno, f"{node.name} leaves untyped: {', '.join(untyped)}"


def product(path: PurePosixPath, tree: ast.Module, text: str) -> Iterator[tuple[int, str]]:
    """Yield what code that ships must not contain."""
    if ast.get_docstring(tree) is None:
        yield 1, "no module docstring: say what enters and what leaves"
    if nameless := NAMELESS & {*path.parent.parts, path.stem}:
        yield 1, f"'{nameless.pop()}' names nothing: give it the name of what it holds"
    for number, line in enumerate(text.splitlines(), 1):
        if found := UNFINISHED.search(line):
            yield number, f"{found[0]} in product code"
    for node in ast.walk(tree):
        match node:
            case ast.Global():
                yield node.lineno, f"global {', '.join(node.names)}"
            case ast.Assert(msg=None):
                yield node.lineno, "assert without a message"
            case ast.Call(func=ast.Name(id="print")) if path.parts[1] != "cli":
                yield node.lineno, "print outside zinfer/cli"
            case ast.Attribute(value=ast.Name(id="os"), attr="environ" | "environb" | "getenv" as name):
                if path != READS_ENVIRONMENT:
                    yield node.lineno, f"os.{name} outside {READS_ENVIRONMENT}"
            case ast.ImportFrom(module="os", names=names) if path != READS_ENVIRONMENT:
                for alias in names:
                    if alias.name in {"environ", "environb", "getenv"}:
                        yield node.lineno, f"os.{alias.name} outside {READS_ENVIRONMENT}"


def quantile(values: list[int], share: float) -> int:
    """The value that `share` of `values` do not exceed; 0 of nothing."""
    ordered = sorted(values) or [0]
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def scan(root: Path, folder: str) -> list[Shape]:
    """Measure every Python file under one folder of the repository."""
    files = sorted((root / folder).rglob("*.py"))
    return [measure(PurePosixPath(f.relative_to(root)), f.read_text(encoding="utf-8")) for f in files]


def row(folder: str, shapes: list[Shape]) -> str:
    """One line of the table."""
    lines = [s.lines for s in shapes]
    functions = [n for s in shapes for n in s.functions]
    documented = percent(sum(s.class_docs for s in shapes), sum(s.classes for s in shapes))
    typed = percent(sum(s.typed for s in shapes), sum(s.slots for s in shapes))
    return (
        f"{folder:<11}{len(lines):>6}{sum(lines):>7}{quantile(lines, 0.5):>7}{max(lines, default=0):>5}"
        f"{len(functions):>10}{quantile(functions, 0.95):>5}{max(functions, default=0):>5}"
        f"{documented:>11}{typed:>7}"
    )


def main() -> int:
    """Print the table and the breaches."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gate", action="store_true", help="exit 1 if there is a breach")
    gate = parser.parse_args().gate

    root = Path(__file__).resolve().parent.parent
    shapes = {folder: scan(root, folder) for folder in ("zinfer", "tools", "benchmarks", "tests")}
    print("             files  lines median  max functions  p95  max class docs  typed")
    for folder, found in shapes.items():
        print(row(folder, found))
    code, tests = (sum(s.lines for s in shapes[folder]) for folder in ("zinfer", "tests"))
    print(f"test lines per line of zinfer: {tests / max(code, 1):.2f}")

    breaches = [
        line for folder, found in shapes.items() if folder != "tests" for s in found for line in s.breaches
    ]
    classes, docs = (sum(getattr(s, key) for s in shapes["zinfer"]) for key in ("classes", "class_docs"))
    if docs < MIN_CLASS_DOCS * classes:
        breaches.append(f"zinfer: {docs} of {classes} classes say what they are, {MIN_CLASS_DOCS:.0%} must")
    if breaches:
        print(f"\n{len(breaches)} breaches", *breaches, sep="\n  ")
    return int(gate and bool(breaches))


if __name__ == "__main__":
    sys.exit(main())
