"""``python -m cogview_kernels``: what was built, and what can be used here.

``python -m cogview_kernels verify``: are the kernels right on this device (verify.py).
"""

from __future__ import annotations

import platform
import sys

import torch

import cogview_kernels
from cogview_kernels import extension, verify


def main() -> None:
    reason = extension.why_not_usable()
    built = ", ".join(extension.architectures())
    facts = {
        "cogview_kernels": cogview_kernels.__version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "kernels built for": built or f"nothing: {extension.why_not_built()}",
        "built against torch": extension.torch_built_with() or "-",
        "CUDA kernels here": "usable" if reason is None else f"not usable: {reason}",
        "host model": extension.why_not_host_model() or "built: the kernels' source on the CPU",
        "portable path": "usable on every device",
    }
    if reason is None:
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            problem = extension.why_not_on(device)
            facts[f"device {index}"] = torch.cuda.get_device_name(device) + (
                f": {problem}" if problem else ""
            )
    for name, value in facts.items():
        print(f"{name:<20} {value}")

    rows = extension.kernel_resources()
    if rows:
        print(f"\n{'kernel':<66} {'arch':<8} {'registers':>9} {'smem':>6} {'spills':>6}")
    for row in sorted(rows, key=lambda row: row["kernel"]):
        spills = row["spill_store_bytes"] + row["spill_load_bytes"]
        print(
            f"{row['kernel']:<66} {row['architecture']:<8} {row['registers']:>9} "
            f"{row['static_smem_bytes']:>6} {spills:>6}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["verify"]:
        sys.exit(verify.main(sys.argv[2:]))
    main()
