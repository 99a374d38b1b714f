"""The operators' schemas, which Python declares, against the functions of ``csrc/operators``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import cogview_kernels  # noqa: F401  registers the schemas

OPERATORS = Path(__file__).resolve().parents[1] / "csrc" / "operators"
NAMES = [
    f"{stem}_{step}_out"
    for stem, steps in {
        "pb_relax_layer_norm": ("forward", "backward"),
        "sandwich_residual": ("forward", "backward"),
        "three_region_attention": ("far_keys", "forward", "backward"),
    }.items()
    for step in steps
]
# Types of schemas and of C++. torch checks neither: an int may be loaded as a double.
CPP_TYPES = {
    "Tensor": "const Tensor&",
    "Optional[Tensor]": "const std::optional<Tensor>&",
    "int": "int64_t",
    "float": "double",
}


def schema_of(name: str) -> list[tuple[str, str]]:
    """Type, as in C++, and name of each argument of the registered schema."""
    schema = getattr(torch.ops.cogview_kernels, name).default._schema
    return [(CPP_TYPES[str(argument.type)], argument.name) for argument in schema.arguments]


def sources() -> str:
    return "\n".join(path.read_text() for path in sorted(OPERATORS.glob("*.cpp")))


def parameters_of(name: str, text: str) -> list[tuple[str, str]]:
    """Type and name of each parameter of the C++ function."""
    (found,) = re.findall(rf"^void {name}\(([^)]*)\) {{", text, re.MULTILINE)
    parameters = [" ".join(parameter.split()) for parameter in found.split(",")]
    return [(kind, name) for kind, _, name in (p.rpartition(" ") for p in parameters)]


def test_every_operator_is_compared() -> None:
    registered = re.findall(r'm\.impl\("(\w+)",\s*TORCH_BOX\(&(?:\w+::)*(\w+)\)', sources())
    assert all(name == function for name, function in registered)
    assert sorted(name for name, _ in registered) == sorted(NAMES)
    namespace = torch._C._dispatch_get_all_op_names()
    declared = {n.partition("::")[2] for n in namespace if n.startswith("cogview_kernels::")}
    assert {name for name in declared if name.endswith("_out")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_schemas_name_the_arguments_of_the_functions(name: str) -> None:
    """torch compares their number alone: two weights in another order would be swapped."""
    assert parameters_of(name, sources()) == schema_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_swapped_arguments_are_seen(name: str) -> None:
    arguments = schema_of(name)
    for i in range(len(arguments) - 1):
        swapped = [*arguments[:i], arguments[i + 1], arguments[i], *arguments[i + 2 :]]
        text = f"void {name}({', '.join(' '.join(argument) for argument in swapped)}) {{"
        assert parameters_of(name, text) == swapped != arguments
