"""Which code a result was made by: a digest that sees what the code does, not how it is written down."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

import trsp_deploy


@functools.cache
def code_digest(*starts: str, without: frozenset[str] = frozenset()) -> str:
    """Hash of modules of the package and of what they import of it, without comments, docstrings and layout.

    starts: files below trsp_deploy/. without: modules and packages, imported but of no influence on the result.
    """
    package = Path(trsp_deploy.__file__).parent
    trees: dict[Path, ast.Module] = {}
    waiting = [package / name for name in starts]
    while waiting:
        path = waiting.pop()
        if path not in trees and not without & {path.stem, path.parent.name}:
            trees[path] = ast.parse(path.read_text(encoding="utf-8"))
            waiting += _imported(trees[path], package)
    return hashlib.sha256("".join(meaning(trees[path]) for path in sorted(trees)).encode()).hexdigest()[:16]


def meaning(tree: ast.Module) -> str:
    """What a module says to Python; the tree loses its docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return ast.dump(tree)


def _imported(tree: ast.Module, package: Path) -> list[Path]:
    """The package's own modules that a module imports from, wherever in it."""
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    own = [package.joinpath(*name.split(".")[1:]) for name in names if name.startswith("trsp_deploy.")]
    return [path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in own]
