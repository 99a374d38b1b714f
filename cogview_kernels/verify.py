"""Self-check: are the kernels right on this device?

    python -m cogview_kernels verify

runs each kind of call that this build and device have kernels for on small problems, compares
results and gradients with the portable path in float64, prints a table, and keeps the outcome in
the user's cache folder under device, driver and build. The kernels run in a process of their own
with a time limit: a hang or a lost CUDA context ends that process alone.

``backend="auto"`` checks a kind of call that neither such an outcome nor a GPU record of this build
vouches for in the same way, in the process, at its first call on a device; never while a CUDA graph
is captured. If the check fails, one warning says so, and the portable path computes from then on.
``COGVIEW_KERNELS_VERIFY=0`` switches the check at the first call off.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview_kernels import extension

TIME_LIMIT_S = 300
# Outcomes that travel with the package, one entry per compute capability. `make gpu-check` writes
# them after all its tests have passed.
GPU_RECORDS = Path(__file__).with_name("gpu_records.json")


class Kind(NamedTuple):
    """A kind of call: a function, and what chooses its kernels."""

    function: str
    dtype: torch.dtype
    variant: int | torch.dtype  # attention: the head dimension; norms: the dtype of the result

    def __str__(self) -> str:
        return f"{self.function} {self.dtype} {self.variant}".replace("torch.", "")


class Outcome(NamedTuple):
    error: float | None  # the largest error of a result, as a share of what is allowed
    reason: str | None  # why the kernels must not be used; None where they are right


# The problems. They call the operators, whose CPU kernels are the portable path.


class Case(NamedTuple):
    """One call on small inputs, the same in every run."""

    name: str
    inputs: list[Tensor]
    call: Callable[..., list[Tensor]]  # (operator's suffix, *inputs) -> results


def kinds(backend: str, device: torch.device) -> list[Kind]:
    """Every kind of call that ``backend`` has kernels for on ``device``."""
    halves = (torch.bfloat16, torch.float16)
    attention = [
        Kind("three_region_attention", dtype, head_dim)
        for dtype in halves
        for head_dim in range(8, 257, 8)
        if extension.why_no_attention_kernel(dtype, head_dim, device, backend) is None
    ]
    norms = [
        Kind(function, dtype, dtype)
        for function in ("pb_relax_layer_norm", "sandwich_residual")
        for dtype in (*halves, torch.float32)
    ]
    float32_residual = [Kind("sandwich_residual", dtype, torch.float32) for dtype in halves]
    return [*attention, *norms, *float32_residual]


def _attention_cases(dtype: torch.dtype, head_dim: int) -> Iterator[Case]:
    # A training sequence, a chunk behind a cache, one token, some tokens whose keys blocks share:
    # several tiles of each region, with ragged ends. The chunk's key/value heads have pivots of
    # their own.
    for q_len, k_len, w, n, text, rows, num_pivots in (
        (200, 200, 48, 2, (5, 70), (2,), 24),
        (33, 150, 64, 1, (0, 40), (2, 2), 30),
        (1, 150, 16, 2, (20, 3), (2,), 20),
        (6, 800, 33, 3, (500, 3), (2,), 200),
    ):
        generator = torch.Generator().manual_seed(q_len)
        pivots = torch.rand(*rows, k_len, generator=generator).argsort()
        pivots = pivots[..., :num_pivots].sort().values.int()
        heads = torch.randn(len(text), k_len, 8, head_dim, generator=generator)
        heads[:, :, :4] *= 3  # sharp weights: a lost key shows in some query
        q, k, v = heads.to(dtype).transpose(1, 2).split([4, 2, 2], dim=1)

        def call(
            suffix: str,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            regions: tuple[Tensor, Tensor] = (torch.tensor(text, dtype=torch.int32), pivots),
            window: tuple[int, int] = (w, n),
        ) -> list[Tensor]:
            text_len, pivots = (tensor.to(q.device) for tensor in regions)
            far_keys = _operator("three_region_attention", f"{suffix}_far_keys")
            attend = _operator("three_region_attention", suffix)
            packed = far_keys(text_len, pivots, k.shape[2])
            inputs = q, k, v, packed, *window, 0.5, -0.5, 0.125
            out, row_max, row_log_sum = attend(*inputs)
            # A cache that is not full, and one that is: these have no gradients.
            lengths = [max(k.shape[2] - 40, q.shape[2]), k.shape[2]]
            kv_lens = torch.tensor(lengths, dtype=torch.int32).to(q.device)
            with torch.no_grad():
                cached, *of_cached = attend(*inputs, kv_lens)
            return [out, row_max + row_log_sum, cached, sum(of_cached)]

        yield Case(f"{q_len} of {k_len} positions", [q[:, :, k_len - q_len :], k, v], call)


_RELAX_OF_HIDDEN = ((512, 1), (1000, 2), (2560, 1), (17000, 1))  # 1: "row", 2: "tensor"


def _norm_cases(dtype: torch.dtype, _: torch.dtype) -> Iterator[Case]:
    for hidden, relax in _RELAX_OF_HIDDEN:
        generator = torch.Generator().manual_seed(hidden)
        x = torch.randn(9, hidden, generator=generator) * 50
        inputs = [x, *torch.randn(2, hidden, generator=generator)]

        def call(suffix: str, *inputs: Tensor, relax: int = relax) -> list[Tensor]:
            return [_operator("pb_relax_layer_norm", suffix)(*inputs, 1e-5, relax)[0]]

        yield Case(f"hidden {hidden}", [tensor.to(dtype) for tensor in inputs], call)


def _sandwich_cases(dtype: torch.dtype, residual_dtype: torch.dtype) -> Iterator[Case]:
    for hidden, relax in _RELAX_OF_HIDDEN:
        generator = torch.Generator().manual_seed(hidden)
        f, residual = torch.randn(2, 9, hidden, generator=generator) * 3
        post, pre = torch.randn(2, 2, hidden, generator=generator)
        inputs = [f.to(dtype), residual.to(residual_dtype)]
        inputs += [*post.to(dtype), *pre.to(residual_dtype)]

        def call(
            suffix: str, f: Tensor, residual: Tensor, *parameters: Tensor, relax: int = relax
        ) -> list[Tensor]:
            sandwich = _operator("sandwich_residual", suffix)
            return list(sandwich(f, residual, True, *parameters, None, 0, 1e-5, relax)[:2])

        yield Case(f"hidden {hidden}", inputs, call)


_CASES: dict[str, Callable[[torch.dtype, Any], Iterator[Case]]] = {
    "three_region_attention": _attention_cases,
    "pb_relax_layer_norm": _norm_cases,
    "sandwich_residual": _sandwich_cases,
}


def _operator(function: str, suffix: str) -> Any:
    return getattr(torch.ops.cogview_kernels, function + suffix)


def _results(case: Case, inputs: list[Tensor], suffix: str) -> list[Tensor]:
    """Results and gradients, in float64 on the CPU."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    results = case.call(suffix, *leaves)
    differentiable = [result for result in results if result.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(result.shape, generator=generator).bfloat16().to(result)
        for result in differentiable
    ]
    gradients = torch.autograd.grad(differentiable, leaves, upstream)
    return [tensor.detach().double().cpu() for tensor in (*results, *gradients)]


def check(kind: Kind, backend: str, device: torch.device) -> Outcome:
    """Run the kernels of ``kind`` on small problems and compare them with portable in float64.

    A result may be wrong by 4 roundings of its largest entry; in float32 by the 64 that sums over
    thousands of terms cost.
    """
    roundings = 64 if kind.dtype == torch.float32 else 4
    suffix = "_host_model" if backend == "host_model" else ""
    worst = 0.0
    for case in _CASES[kind.function](kind.dtype, kind.variant):
        truth = _results(case, [tensor.double() for tensor in case.inputs], "")
        try:
            results = _results(case, [tensor.to(device) for tensor in case.inputs], suffix)
        except torch.OutOfMemoryError:
            raise  # says nothing about the kernels
        except RuntimeError as problem:
            first_line = str(problem)[:200].partition("\n")[0]
            return Outcome(None, f"{case.name}: {first_line}")
        for result, expected in zip(results, truth, strict=True):
            allowed = roundings * torch.finfo(kind.dtype).eps * expected.abs().max().item()
            error = (result - expected).abs().max().item() / allowed
            if not error <= 1:  # NaN too
                return Outcome(error, f"{case.name}: error {error:.3g} times what is allowed")
            worst = max(worst, error)
    return Outcome(worst, None)


# Who vouches


def build_id() -> str:
    """The compiled kernels of this installation, as a digest."""
    assert extension._C is not None
    return hashlib.sha256(Path(extension._C.__file__).read_bytes()).hexdigest()[:16]


def describe(device: torch.device) -> dict[str, Any]:
    """What an outcome holds for."""
    return {
        "device": torch.cuda.get_device_name(device),
        "compute_capability": list(torch.cuda.get_device_capability(device)),
        "driver": torch._C._cuda_getDriverVersion(),  # type: ignore[attr-defined]
        "build": build_id(),
        "sources": extension.kernel_sources(),
    }


def _cache_file(facts: dict[str, Any]) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = json.dumps([facts[name] for name in ("device", "driver", "build")])
    return Path(
        root, "cogview_kernels", f"verify-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    )


def keep(outcomes: dict[str, Outcome], facts: dict[str, Any]) -> Path:
    """Add the outcomes on a device to those in the user's cache folder."""
    path = _cache_file(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, {**facts, "date": _date(), "outcomes": _kept(facts) | outcomes})
    return path


def record(outcomes: dict[str, Outcome], facts: dict[str, Any]) -> None:
    """Put the outcomes on a device beside this file: they vouch for every build of the sources."""
    entries = [entry for entry in _gpu_records() if not _same_kernels(entry, facts)]
    _write(GPU_RECORDS, [*entries, {**facts, "date": _date(), "outcomes": outcomes}])


def _write(path: Path, content: Any) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as file:
        json.dump(content, file, indent=1)
    os.chmod(file.name, 0o644)  # a record is installed for every user
    os.replace(file.name, path)


def _date() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _kept(facts: dict[str, Any]) -> dict[str, Outcome]:
    try:
        outcomes = json.loads(_cache_file(facts).read_text())["outcomes"]
        return {name: Outcome(*outcome) for name, outcome in outcomes.items()}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        # No outcome, a file that cannot be read, or no home (RuntimeError): nobody vouches.
        return {}


def _gpu_records() -> list[dict[str, Any]]:
    try:
        return json.loads(GPU_RECORDS.read_text())
    except (OSError, ValueError):  # none, or a file that cannot be read: nobody vouches
        return []


def _same_kernels(entry: dict[str, Any], facts: dict[str, Any]) -> bool:
    return all(entry[name] == facts[name] for name in ("compute_capability", "sources"))


@functools.cache
def _known(device: torch.device) -> dict[str, Outcome]:
    """The outcomes on record for this device, driver and build."""
    facts = describe(device)
    known: dict[str, Outcome] = {}
    for entry in _gpu_records():
        if _same_kernels(entry, facts):
            known |= {name: Outcome(*outcome) for name, outcome in entry["outcomes"].items()}
    return known | _kept(facts)


_checked: dict[tuple[Kind, torch.device], str | None] = {}
_lock = threading.Lock()


@torch.compiler.assume_constant_result  # torch.compile calls it while tracing
def why_not_trusted(
    function: str, dtype: torch.dtype, variant: int | torch.dtype, device: torch.device
) -> str | None:
    """Why the CUDA kernels for a :class:`Kind` of call must not be used on ``device``; ``None`` if
    they may.

    Checks a kind that nobody vouches for, once in this process. Nothing can be checked while the
    current stream captures a CUDA graph, inside a backward, and where memory runs out: the kernels
    are used, and a later call checks them.
    """
    key = Kind(function, dtype, variant), device
    if key in _checked:
        return _checked[key]
    if os.environ.get("COGVIEW_KERNELS_VERIFY") == "0" or torch.cuda.is_current_stream_capturing():
        return None
    # The check's own backward would wait for the thread of autograd that waits for the check.
    if torch._C._current_graph_task_id() != -1:
        return None
    with _lock:
        if key not in _checked:
            outcome = _known(device).get(str(key[0]))
            outcome = outcome or _in_a_thread(functools.partial(check, key[0], "cuda", device))
            if outcome is None:
                return None
            _checked[key] = _reason(outcome, *key)
    return _checked[key]


def _reason(outcome: Outcome, kind: Kind, device: torch.device) -> str | None:
    if outcome.reason is None:
        return None
    return (
        f"the self-check of the kernels for {kind} failed on {torch.cuda.get_device_name(device)} "
        f"({outcome.reason}); please report it, with what `python -m cogview_kernels verify` prints"
    )


def _in_a_thread(function: Callable[[], Outcome]) -> Outcome | None:
    """Call ``function`` where nothing of the caller is active: modes, autocast, transforms and
    inference mode belong to a thread. ``None`` where memory ran out."""
    outcome: Outcome | None = Outcome(None, "the check itself failed")

    def run() -> None:
        nonlocal outcome
        try:
            outcome = function()
        except torch.OutOfMemoryError:
            outcome = None

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome


# The command


def main(arguments: list[str]) -> int:
    """``python -m cogview_kernels verify``; 0: all are right, 1: not all, 2: none can run."""
    parser = argparse.ArgumentParser(
        prog="python -m cogview_kernels verify",
        description="Check every kernel on small problems against the portable path.",
    )
    parser.add_argument("--backend", choices=("cuda", "host_model"), default="cuda")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, metavar="SECONDS")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="kinds of call that contain TEXT"
    )
    parser.add_argument("--record", action="store_true", help=f"also write {GPU_RECORDS.name}")
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)  # these, in this process
    options = parser.parse_args(arguments)
    if options.record and options.only:
        parser.error("--record: expected every kind of call, got --only")
    if options.worker is not None:
        return _work(options.backend, options.worker)

    if options.backend == "cuda":
        reason, device = extension.why_not_usable(), torch.device("cuda")
        if reason is None:
            device = torch.device("cuda", torch.cuda.current_device())
            reason = extension.why_not_on(device)
    else:
        reason, device = extension.why_not_host_model(), torch.device("cpu")
    if reason is not None:
        print(f"nothing can be verified: {reason}")
        return 2

    names = [str(kind) for kind in kinds(options.backend, device) if options.only in str(kind)]
    print(f"{'kind of call':<45} {'error':>6}  of what is allowed", flush=True)
    worker = [sys.executable, "-m", "cogview_kernels", "verify", "--backend", options.backend]
    outcomes = _supervise(names, [*worker, "--worker"], options.time_limit)
    wrong = [name for name, outcome in outcomes.items() if outcome.reason is not None]
    if options.backend == "cuda":
        try:
            print(f"kept in {keep(outcomes, describe(device))}")
        except (OSError, RuntimeError) as problem:  # RuntimeError: no home
            print(f"not kept: {problem}")
        if options.record and not wrong:
            record(outcomes, describe(device))
    print(f"{len(outcomes) - len(wrong)} of {len(outcomes)} right")
    return 1 if wrong else 0


def _supervise(names: list[str], worker: list[str], time_limit: float) -> dict[str, Outcome]:
    """Check the kinds in a process of their own, ``worker``. If it dies, the kind that it was at
    has failed, and a new process checks those behind it."""
    outcomes: dict[str, Outcome] = {}

    def settle(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        error = "-" if outcome.error is None else f"{outcome.error:.3f}"
        print(f"{name:<45} {error:>6}  {outcome.reason or 'right'}", flush=True)

    end = time.monotonic() + time_limit
    while rest := [name for name in names if name not in outcomes]:
        process = subprocess.Popen(
            [*worker, *rest], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        timer = threading.Timer(max(end - time.monotonic(), 0), process.kill)
        timer.start()
        last_line = ""
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_OUTCOME):
                name, *outcome = json.loads(line.removeprefix(_OUTCOME))
                settle(name, Outcome(*outcome))
            else:
                last_line = line.strip() or last_line
        process.wait()
        timer.cancel()
        rest = [name for name in rest if name not in outcomes]
        if time.monotonic() >= end:
            for name in rest:
                settle(name, Outcome(None, f"no answer within {time_limit:g} s"))
        elif rest:
            settle(rest[0], Outcome(None, f"its process ended: {last_line or process.returncode}"))
    return outcomes


_OUTCOME = "outcome: "


def _work(backend: str, names: list[str]) -> int:
    """Check the kinds in this process; one line for each."""
    device = torch.device("cpu" if backend == "host_model" else "cuda")
    extension.why_no_kernel_on(device, backend)  # registers the host model's operators
    for kind in kinds(backend, device):
        if str(kind) in names:
            print(_OUTCOME + json.dumps([str(kind), *check(kind, backend, device)]), flush=True)
    return 0
