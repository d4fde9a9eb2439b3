"""Kernels that ship without a launch: nothing would tell if they spilled."""

import ast
from collections.abc import Iterable
from pathlib import Path


def entry_kernels(files: Iterable[Path]) -> set[tuple[str, str]]:
    """(file's stem, function) for each @triton.jit function that no other one uses."""
    found: set[tuple[str, str]] = set()
    used: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(map(_is_jit, node.decorator_list)):
                found.add((file.stem, node.name))
                names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                names |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                used |= names - {node.name}
    return {(file, name) for file, name in found if name not in used}


def _is_jit(decorator: ast.expr) -> bool:
    """@triton.jit, @jit, and both with arguments."""
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called) in ("triton.jit", "jit")
