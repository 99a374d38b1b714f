"""Which module imports which: arrows point downwards, and there are no circles.

The graph is read from the source, so that it also holds imports inside functions, imports for type
checkers alone and ``importlib.import_module("name")``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cogview_kernels", "cogview", "benchmarks")


def source_files(root: Path) -> dict[str, Path]:
    """Path of every module, by the name under which it is imported."""
    modules = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            modules[".".join(parts)] = path
    return modules


def imported_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name in it or "") of every import; relative imports are not used here."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "expected an absolute import"
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), ""


def import_graph(root: Path) -> dict[str, set[str]]:
    """The modules of this repository that each module names in its imports.

    Python also runs the ``__init__`` of the packages above a module; that is no arrow, or every
    package that re-exports a name would be a circle.
    """
    modules = source_files(root)
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = set()
        for imported, name in imported_names(ast.parse(path.read_text())):
            submodule = f"{imported}.{name}"
            targets.add(submodule if submodule in modules else imported)
        graph[module] = targets & modules.keys()
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, or nothing."""
    finished: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for target in sorted(graph[path[-1]] - finished):
            if target in path:
                return path[path.index(target) :]
            if found := search([*path, target]):
                return found
        finished.add(path[-1])
        return []

    for module in graph:
        if module not in finished and (found := search([module])):
            return found
    return []


def private_names(source: str, public: set[str]) -> list[str]:
    """What a source takes from ``cogview_kernels`` beside its public names."""
    tree = ast.parse(source)
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "cogview_kernels"
    }
    found = [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in aliases
        and node.attr not in public
    ]
    for module, name in imported_names(tree):
        if module.startswith("cogview_kernels.") or (module == "cogview_kernels" and name):
            if module != "cogview_kernels" or name not in public:
                found.append(f"{module}.{name}".rstrip("."))
    return found


def public_names() -> set[str]:
    tree = ast.parse((ROOT / "cogview_kernels" / "__init__.py").read_text())
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return set(names)


def test_no_module_imports_itself_through_others() -> None:
    graph = import_graph(ROOT)
    assert (
        len(graph) > 40 and "benchmarks.suite.cases" in graph["benchmarks.suite.entries"]
    )  # the graph is not empty by mistake
    assert circle_in(graph) == []


def test_arrows_point_downwards() -> None:
    def package(module: str) -> int:
        return PACKAGES.index(module.partition(".")[0])

    graph = import_graph(ROOT)
    upwards = [
        (module, target)
        for module, targets in graph.items()
        for target in targets
        if package(target) > package(module)
    ]
    assert upwards == []


@pytest.mark.parametrize("path", sorted((ROOT / "cogview").rglob("*.py")), ids=lambda p: p.stem)
def test_the_model_uses_public_names_of_the_kernels(path: Path) -> None:
    assert private_names(path.read_text(), public_names()) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import cogview.b",
        "from cogview.b import name",
        "from cogview import b",
        "def function():\n    import cogview.b",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import cogview.b",
        "import importlib\nimportlib.import_module('cogview.b')",
    ],
)
def test_every_kind_of_import_is_an_arrow(tmp_path: Path, statement: str) -> None:
    (tmp_path / "cogview").mkdir()
    for name, source in (("__init__", ""), ("a", statement), ("b", "import cogview.c"), ("c", "")):
        (tmp_path / "cogview" / f"{name}.py").write_text(source)
    assert import_graph(tmp_path)["cogview.a"] == {"cogview.b"}
    assert circle_in(import_graph(tmp_path)) == []
    (tmp_path / "cogview" / "c.py").write_text("from cogview.a import name")
    assert circle_in(import_graph(tmp_path)) == ["cogview.a", "cogview.b", "cogview.c"]


@pytest.mark.parametrize(
    "source",
    [
        "from cogview_kernels import extension",
        "from cogview_kernels.checks import check_float",
        "import cogview_kernels.checks",
        "import cogview_kernels as ck\nck.checks.check_float",
    ],
)
def test_a_private_name_is_found(source: str) -> None:
    assert private_names(source, {"patch"}) != []
    assert private_names("import cogview_kernels as ck\nck.patch", {"patch"}) == []
