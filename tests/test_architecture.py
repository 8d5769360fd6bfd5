"""The house holds: imports go one way, and files and functions stay readable."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/neobert"
FILES = sorted(SOURCE.rglob("*.py"))
MAY_IMPORT = {
    "config": set(),
    "model": set(),
    "data": set(),
    "optim": {"model"},
    "checkpoints": {"model", "data", "config", "optim"},
    "training": {"checkpoints", "model", "data", "config", "optim"},
    "inference": {"training", "checkpoints", "model", "data", "config", "optim"},
    "insight": {"training", "checkpoints", "model", "data", "config", "optim"},
    "export": {"inference", "training", "checkpoints", "model", "data", "config"},
    "tasks": {"inference", "insight", "training", "checkpoints", "model", "data", "config", "optim"},
}
MOST_OWN_MODULES = 14


def folder(path):
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else "(top)"


def our_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("neobert."):
            yield node.module.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    here = folder(path)
    if here in MAY_IMPORT:
        assert set(our_imports(path)) <= MAY_IMPORT[here] | {here, "errors", "files", "ranks"}


def our_modules(path):
    """The modules of ours that a file imports, also within functions; a package counts where a name of its own is taken."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(SOURCE.parent).with_suffix("").parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for parts in (name.split(".") for name in names if name.split(".")[0] == "neobert"):
            while not (SOURCE.parent.joinpath(*parts).with_suffix(".py").is_file() or is_package(parts)):
                parts.pop()
            found.add(".".join(parts))
    return found - {"neobert"}


def is_package(parts):
    return SOURCE.parent.joinpath(*parts, "__init__.py").is_file()


def test_a_module_imports_few_of_ours():
    numbers = {str(path.relative_to(SOURCE)): len(our_modules(path)) for path in FILES}
    assert not {name: number for name, number in numbers.items() if number > MOST_OWN_MODULES}


def test_one_file_knows_deepspeed():
    """It is training/deepspeed.py, which nobody but runtime.py imports."""
    for path in FILES:
        imported = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            )
        }
        assert path.name == "deepspeed.py" or not any(name.split(".")[0] == "deepspeed" for name in imported), path
        if "neobert.training.deepspeed" in imported:
            assert path.name == "runtime.py", path


def test_model_folder_is_self_contained():
    """Export ships these files as they are, so they import torch, transformers and each other, relatively.

    Packages with further kernels are imported by name, where they are called: transformers would require them.
    """
    always = {"torch", "transformers", "dataclasses", "typing", "collections", "functools", "itertools", "importlib"}
    for path in (SOURCE / "model").glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in always, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_sizes(path):
    assert path.read_text().count("\n") <= 400
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
