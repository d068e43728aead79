"""The shape of the code, as CONTRIBUTING.md states it."""

import ast
from pathlib import Path

import lorafit

ROOT = Path(lorafit.__file__).parent
ORDER = [
    "errors",
    "config",
    "formats",
    "containers",
    "kernels",
    "modules",
    "adapters",
    "models",
    "data",
    "objectives",
    "evaluation",
    "training",
    "merging",
    "exporting",
    "commands",
    "cli",
]


def place(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Which parts of lorafit a file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lorafit."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found.update(name.name.split(".")[1] for name in node.names if name.name.startswith("lorafit."))
    return found


def test_imports_point_one_way():
    files = [path for path in ROOT.rglob("*.py") if place(path) in ORDER]
    assert len(files) > 40
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path in files
        for other in imports(path)
        if other in ORDER and ORDER.index(other) > ORDER.index(place(path))
    ]
    assert not wrong


def test_every_part_has_its_place():
    outside = {"__init__", "__main__", "__pycache__", "nn", "py.typed"}
    assert {place(path) for path in ROOT.iterdir()} - outside <= set(ORDER)


def test_no_file_is_too_long():
    repository = Path(__file__).parent.parent
    long = [
        str(path.relative_to(repository))
        for folder in ("src", "tests", "benchmarks", "examples")
        for path in (repository / folder).rglob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > 500
    ]
    assert not long
