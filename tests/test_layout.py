"""Imports run one way: every module imports from its own layer or from those before it, and there is no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "cpo_kernels"
# From the ground up. What stands together may import each other, as long as no circle comes of it.
LAYERS = (
    ("arguments", "checks", "extras", "environment", "files"),
    ("objectives", "library"),
    ("reference",),
    ("kernels", "backends"),
    ("ops",),
    ("batch_plan", "head"),
    ("losses",),
    ("recipe",),
    ("hub",),
    ("data",),
    ("integrations",),
    ("training",),
    ("evaluation",),
    ("play", "demo", "check"),
    ("bench",),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, ast.Module]:
    """Dotted name below cpo_kernels -> its tree; a package is its __init__."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return trees


def imports(tree: ast.Module, names: set[str]) -> set[str]:
    """The modules of ours that a module imports, at its top or inside of a function; '' for the public names."""
    made = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cpo_kernels":
            base = (node.module or "").partition(".")[2]
            for alias in node.names:
                full = f"{base}.{alias.name}".strip(".")
                made.add(full if full in names else base)
        elif isinstance(node, ast.Import):
            made |= {a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "cpo_kernels"}
    return made


def test_every_module_has_a_layer():
    assert {name.split(".")[0] for name in modules() if name} == set(RANK)


def test_imports_run_one_way():
    """The public names (`import cpo_kernels as cpo`) are for what comes after the losses."""
    trees = modules()
    up = []
    for name, tree in trees.items():
        for target in imports(tree, set(trees)) if name else ():
            rank = RANK[target.split(".")[0]] if target else RANK["losses"] + 1
            if rank > RANK[name.split(".")[0]]:
                up.append(f"{name} imports {target or 'cpo_kernels'}")
    assert not up, "\n".join(sorted(up))


def test_no_circles():
    trees = modules()
    graph = {name: imports(tree, set(trees)) - {""} for name, tree in trees.items() if name}
    list(TopologicalSorter(graph).static_order())
