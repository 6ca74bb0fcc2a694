"""Which code a result was made by: a digest that sees what the code does, not how it is written down, nor where."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import trsp_deploy


@functools.cache
def code_digest(*starts: str, without: frozenset[str] = frozenset(), beside: tuple[Path, ...] = ()) -> str:
    """Hash of modules of the package and of what they import of it, without comments, docstrings, layout and places.

    starts: files below trsp_deploy/. without: modules and packages, imported but of no influence on the result.
    beside: modules of a bench itself, which count alone.
    """
    package = Path(trsp_deploy.__file__).parent
    trees: dict[Path, ast.Module] = {}
    waiting = [package / name for name in starts]
    while waiting:
        path = waiting.pop()
        if path not in trees and not without & {path.stem, path.parent.name}:
            trees[path] = ast.parse(path.read_text(encoding="utf-8"))
            waiting += _imported(trees[path], package)
    trees |= {path: ast.parse(path.read_text(encoding="utf-8")) for path in beside}
    statements = set().union(*map(meaning, trees.values()))
    return hashlib.sha256("\n".join(sorted(statements)).encode()).hexdigest()[:16]


def meaning(tree: ast.Module) -> set[str]:
    """What a module says to Python, by statement, wherever in the package that stands; the tree is changed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    taken = _OwnImports()
    taken.visit(tree)
    return {*taken.renamed, *(ast.dump(node) for node in tree.body if not _is_all(node))}


class _OwnImports(ast.NodeTransformer):
    """Takes out imports of the package's own modules, which say where code stands, and keeps what they rename."""

    def __init__(self) -> None:
        self.renamed: set[str] = set()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        if not _is_own(node):
            return node
        self.renamed |= {f"{name.name} as {name.asname}" for name in node.names if name.asname}
        return None


def _imported(tree: ast.Module, package: Path) -> Iterator[Path]:
    """The package's own modules that a module imports, or imports from, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_own(node):
            place = package.joinpath(*(node.module or "").split(".")[1:])
            yield place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            # `from trsp_deploy.tools.runners import ort_build` names a module and not what the package defines.
            yield from filter(Path.is_file, (place / f"{name.name}.py" for name in node.names))


def _is_own(node: ast.ImportFrom) -> bool:
    return (node.module or "").startswith("trsp_deploy.")


def _is_all(node: ast.stmt) -> bool:
    """Whether it is `__all__ = [...]`: what a package hands on from its modules."""
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
