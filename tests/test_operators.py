"""The operators' schemas, which Python declares, against the functions of ``csrc/operators``, and
what those of the norms refuse. ``test_backends.py`` has what those of the attention refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogview_kernels import extension

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


def norm_arguments(name: str, *shape: int) -> dict[str, Any]:
    """Of a call that is right, on rows of this shape."""
    rows, hidden = torch.Size(shape[:-1]).numel(), shape[-1]
    number_of_gradients = 2 if name.startswith("pb_relax") else 4

    def tensor(argument: str) -> Tensor:
        if "statistics" in argument:
            return torch.ones(rows, 4)
        if "weight" in argument or "bias" in argument:
            return torch.ones(hidden)
        if argument == "partial":
            return torch.ones(number_of_gradients, 2, hidden)
        number = {"peak": 1, "peaks": 2}.get(argument)
        if number is not None:
            return torch.zeros(number)
        return torch.tensor([3]) if argument == "seed" else torch.ones(shape)

    numbers = {"eps": 1e-5, "relax": 2, "num_blocks": 2, "dropout": 100}
    return {
        argument: tensor(argument) if "Tensor" in kind else numbers[argument]
        for kind, argument in schema_of(name)
    }


BAD: dict[str, Callable[[Tensor], Tensor]] = {
    "empty": lambda t: t.new_empty([0] * t.dim()),
    "a scalar": lambda t: t.new_zeros(()),
    "one element less": lambda t: t[..., :-1].contiguous(),
    "one row less": lambda t: t[:-1],
    "one row more": lambda t: torch.cat([t, t[:1]]),
    "elements apart": lambda t: torch.stack([t, t], -1)[..., 0],
    "one column": lambda t: t[..., None],
    "rows in another order": lambda t: t.transpose(-3, -2).contiguous().transpose(-3, -2),
    "float64": lambda t: t.double(),
}


@pytest.mark.skipif(
    extension.why_not_host_model() is not None, reason="the host model is not built"
)
@pytest.mark.parametrize("shape", [(6, 16), (3, 2, 16), (1, 3, 2, 16)], ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if "attention" not in name])
def test_operators_of_norms_refuse_what_they_cannot_address(
    name: str, shape: tuple[int, ...]
) -> None:
    """With an error of their own, before a kernel runs: the host model would find the access."""
    operator = getattr(torch.ops.cogview_kernels, name)
    operator(**norm_arguments(name, *shape))
    for argument, value in norm_arguments(name, *shape).items():
        if not isinstance(value, Tensor):
            continue
        for what, change in BAD.items():
            if value.numel() == 1 and what == "elements apart":
                continue  # one element has no neighbour
            if value.dim() < 3 and what == "rows in another order":
                continue  # a matrix whose columns are contiguous: "elements apart"
            with pytest.raises(RuntimeError, match="expected") as error:
                operator(**norm_arguments(name, *shape) | {argument: change(value)})
                pytest.fail(f"{argument}: {what} was not refused")
            assert "cogview_kernels: " not in str(error.value), (argument, what)
