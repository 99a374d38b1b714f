"""The self-check passes right kernels, fails wrong ones, and survives those that hang or die."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_attention_kernels import backend_or_skip
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cogview_kernels import backends, extension, verify
from cogview_kernels.attention import function as attention_function
from cogview_kernels.norm import function as norm_function
from cogview_kernels.verify import Kind, Outcome

needs_host_model = pytest.mark.skipif(
    extension.why_not_host_model() is not None, reason=str(extension.why_not_host_model())
)
CPU = torch.device("cpu")
CHECK = verify.check
ATTENTION = Kind("three_region_attention", torch.bfloat16, 64)
NORM = Kind("pb_relax_layer_norm", torch.float16, torch.float16)
SANDWICH = Kind("sandwich_residual", torch.bfloat16, torch.float32)
FACTS = {
    "device": "a GPU",
    "compute_capability": [9, 0],
    "driver": 13000,
    "build": "b",
    "sources": "s",
}


def device_of(backend: str) -> torch.device:
    return torch.device("cuda", 0) if backend == "cuda" else CPU


@pytest.fixture(params=[backend_or_skip("host_model"), backend_or_skip("cuda")])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def nobody_vouches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No outcomes but the test's own, and a GPU that only answers questions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("COGVIEW_KERNELS_VERIFY", raising=False)
    monkeypatch.setattr(verify, "GPU_RECORDS", tmp_path / "gpu_records.json")
    monkeypatch.setattr(verify, "describe", lambda device: dict(FACTS))
    monkeypatch.setattr(verify, "_checked", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    verify._known.cache_clear()
    yield
    verify._known.cache_clear()


@pytest.mark.parametrize("kind", [ATTENTION, NORM, SANDWICH], ids=str)
def test_right_kernels_pass(backend: str, kind: Kind) -> None:
    outcome = verify.check(kind, backend, device_of(backend))
    assert outcome.reason is None and outcome.error is not None and 0 < outcome.error < 0.5


def lost_pivot(q: Tensor, k: Tensor, v: Tensor, far_keys: Tensor, *rest: Any) -> tuple[Any, ...]:
    count, first, others = far_keys.split([2, 1, far_keys.shape[-1] - 3], dim=-1)
    far_keys = torch.cat([count, others, torch.full_like(first, k.shape[2])], dim=-1)
    far_keys[..., 1] -= 1  # the number of pivots
    return q, k, v, far_keys, *rest


def lost_bias(q: Tensor, k: Tensor, v: Tensor, far_keys: Tensor, *rest: Any) -> tuple[Any, ...]:
    return q, k, v, far_keys, *rest[:2], 0.0, *rest[3:]


def other_eps(x: Tensor, weight: Tensor, bias: Tensor, eps: float, relax: int) -> tuple[Any, ...]:
    return x, weight, bias, 0.5, relax


def not_finite(x: Tensor, *rest: Any) -> tuple[Any, ...]:
    return x * float("nan"), *rest


@pytest.mark.parametrize(
    "kind, slip",
    [(ATTENTION, lost_pivot), (ATTENTION, lost_bias), (NORM, other_eps), (NORM, not_finite)],
)
def test_wrong_kernels_fail(
    monkeypatch: pytest.MonkeyPatch, backend: str, kind: Kind, slip: Callable[..., tuple[Any, ...]]
) -> None:
    """The kernels get other arguments than the portable path."""
    suffix = "_host_model" if backend == "host_model" else ""
    device, right = device_of(backend), verify._operator

    def operator(function: str, which: str) -> Any:
        op = right(function, which)
        # With "cuda" both have one name, and the kernels get the tensors on the GPU.
        return lambda *args: op(
            *(slip(*args) if which == suffix and args[0].device == device else args)
        )

    monkeypatch.setattr(verify, "_operator", operator)
    outcome = verify.check(kind, backend, device)
    assert outcome.reason is not None and "times what is allowed" in outcome.reason


def test_an_error_of_the_kernels_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def results(case: Any, inputs: Any, suffix: str) -> list[Tensor]:
        if suffix:
            raise RuntimeError("kernel launch failed: illegal address")
        return [torch.ones(1)]

    monkeypatch.setattr(verify, "_results", results)
    outcome = verify.check(NORM, "host_model", CPU)
    assert outcome == Outcome(None, "hidden 512: kernel launch failed: illegal address")


# The first call


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Kind]:
    """The kinds that were checked; every check passes."""
    seen: list[Kind] = []

    def check(kind: Kind, backend: str, device: torch.device) -> Outcome:
        seen.append(kind)
        return Outcome(0.1, None)

    monkeypatch.setattr(verify, "check", check)
    return seen


GPU = torch.device("cuda", 0)


def test_a_kind_is_checked_once_for_each_device(checks: list[Kind]) -> None:
    for device in (GPU, GPU, torch.device("cuda", 1)):
        for kind in (NORM, SANDWICH, NORM):
            assert verify.why_not_trusted(*kind, device) is None
    assert checks == [NORM, SANDWICH, NORM, SANDWICH]


def test_a_failed_check_names_kind_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Outcome(7.0, "hidden 512: error 7 times what is allowed")
    monkeypatch.setattr(verify, "check", lambda *_: failed)
    for _ in range(2):
        reason = verify.why_not_trusted(*NORM, GPU)
        assert reason is not None
        assert "pb_relax_layer_norm float16" in reason and "a GPU" in reason
        assert "error 7 times what is allowed" in reason


def test_auto_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """``backend="cuda"`` takes the kernels all the same: somebody has to look at what they do."""
    monkeypatch.setattr(verify, "check", lambda *_: Outcome(7.0, "wrong"))
    monkeypatch.setattr(extension, "why_no_kernel_on", lambda device, backend: None)
    monkeypatch.setattr(extension, "_why_no_attention_family", lambda *_: None)
    monkeypatch.setattr(backends, "_warned", set())
    x = SimpleNamespace(dtype=torch.float16, device=GPU, shape=(1, 2, 8, 64))

    def kernels(backend: str) -> list[bool]:
        attention = backends.kernels_usable(
            "three_region_attention", backend, attention_function._unsupported(x, x, backend)
        )
        norm = norm_function._kernels("pb_relax_layer_norm", backend, x, x.dtype)
        return [attention, norm is not None]

    with pytest.warns(UserWarning, match="self-check of the kernels for .* failed") as warned:
        assert kernels("auto") == kernels("auto") == [False, False]
    assert len(warned) == 2  # one for each function
    assert kernels("cuda") == [True, True]


def test_no_check_while_capturing(checks: list[Kind], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert verify.why_not_trusted(*NORM, GPU) is None and checks == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert verify.why_not_trusted(*NORM, GPU) is None and checks == [NORM]


def test_no_check_inside_a_backward(checks: list[Kind]) -> None:
    """The thread of autograd that waited for the check could not run the check's own backward."""
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda gradient: verify.why_not_trusted(*NORM, GPU))
    x.sum().backward()
    assert checks == []
    assert verify.why_not_trusted(*NORM, GPU) is None and checks == [NORM]


def test_running_out_of_memory_is_no_outcome(
    checks: list[Kind], monkeypatch: pytest.MonkeyPatch
) -> None:
    def results(case: Any, inputs: Any, suffix: str) -> list[Tensor]:
        if suffix:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [torch.ones(1)]

    with monkeypatch.context() as full:
        full.setattr(verify, "_results", results)
        full.setattr(verify, "check", lambda *_: CHECK(NORM, "host_model", CPU))
        assert verify.why_not_trusted(*NORM, GPU) is None
    assert verify.why_not_trusted(*NORM, GPU) is None and checks == [NORM]


def test_the_check_can_be_switched_off(checks: list[Kind], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGVIEW_KERNELS_VERIFY", "0")
    assert verify.why_not_trusted(*NORM, GPU) is None and checks == []


def test_outcomes_on_record_spare_the_check(checks: list[Kind]) -> None:
    verify.keep({str(NORM): Outcome(0.1, None)}, FACTS)
    path = verify.keep({str(SANDWICH): Outcome(3.0, "wrong")}, FACTS)
    assert verify.why_not_trusted(*NORM, GPU) is None and checks == []
    assert "wrong" in str(verify.why_not_trusted(*SANDWICH, GPU)) and checks == []
    assert verify.why_not_trusted(*ATTENTION, GPU) is None and checks == [ATTENTION]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no temporary file


@pytest.mark.parametrize("changed", ["device", "driver", "build"])
def test_outcomes_of_another_machine_vouch_for_nothing(checks: list[Kind], changed: str) -> None:
    verify.keep({str(NORM): Outcome(0.1, None)}, {**FACTS, changed: "another"})
    assert verify.why_not_trusted(*NORM, GPU) is None and checks == [NORM]


def test_an_unreadable_outcome_vouches_for_nothing(checks: list[Kind]) -> None:
    verify.keep({}, FACTS).write_text('{"outcomes": ')
    verify.GPU_RECORDS.write_text('[{"outcomes": ')
    assert verify.why_not_trusted(*NORM, GPU) is None and checks == [NORM]


def test_without_a_home_nothing_is_kept(
    checks: list[Kind], monkeypatch: pytest.MonkeyPatch
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert verify.why_not_trusted(*NORM, GPU) is None and checks == [NORM]


def test_every_user_can_read_a_record() -> None:
    verify.record({str(NORM): Outcome(0.1, None)}, FACTS)
    assert verify.GPU_RECORDS.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "changed, vouches", [(None, True), ("sources", False), ("compute_capability", False)]
)
def test_a_gpu_record_of_these_sources_vouches(
    checks: list[Kind], changed: str | None, vouches: bool
) -> None:
    facts: dict[str, Any] = {**FACTS, "driver": 1, "build": "of another machine"}
    if changed:
        facts[changed] = "another"
    verify.record({str(NORM): Outcome(7.0, "an older outcome")}, facts)
    verify.record({str(NORM): Outcome(0.1, None)}, facts)
    assert verify.why_not_trusted(*NORM, GPU) is None
    assert checks == ([] if vouches else [NORM])


@pytest.mark.skipif(
    extension.why_not_host_model() is not None, reason="the host model is not built"
)
def test_the_check_knows_nothing_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither modes nor transforms of the first call reach the check."""
    check = verify.check
    monkeypatch.setattr(verify, "check", lambda kind, *_: check(kind, "host_model", CPU))

    def first_call(x: Tensor) -> Tensor:
        verify._checked.clear()
        assert verify.why_not_trusted(*NORM, GPU) is None
        return x

    with FakeTensorMode(), torch.inference_mode():
        first_call(torch.ones(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first_call(torch.ones(1))
    torch.vmap(first_call)(torch.ones(2))


# The command


@pytest.mark.skipif(
    extension.why_not_host_model() is not None, reason="the host model is not built"
)
def test_command(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--backend", "host_model", "--only", "pb_relax_layer_norm float16"]
    assert verify.main(arguments) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[1].startswith(str(NORM)) and lines[1].endswith("right")
    assert lines[2:] == ["1 of 1 right"]


@pytest.mark.skipif(extension.why_not_usable() is None, reason="CUDA kernels can run here")
def test_command_without_a_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    assert verify.main([]) == 2
    assert "nothing can be verified: " in capfd.readouterr().out


def test_a_record_holds_every_kind(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        verify.main(["--record", "--only", "pb_relax"])
    assert "--record: expected every kind of call, got --only" in capfd.readouterr().err


WORKER = """
import json, os, sys, time
for name in sys.argv[1:]:
    if name == "dies":
        print("an illegal memory access", flush=True)
        os.abort()
    if name == "hangs":
        time.sleep(60)
    print("outcome: " + json.dumps([name, 0.5, None]), flush=True)
"""


def test_a_kernel_that_dies_or_hangs_is_an_outcome() -> None:
    worker = [sys.executable, "-c", WORKER]
    right = Outcome(0.5, None)
    assert verify._supervise(["a", "dies", "b"], worker, 60) == {
        "a": right,
        "dies": Outcome(None, "its process ended: an illegal memory access"),
        "b": right,
    }
    late = Outcome(None, "no answer within 2 s")
    assert verify._supervise(["a", "hangs", "b"], worker, 2) == {
        "a": right,
        "hangs": late,
        "b": late,
    }
