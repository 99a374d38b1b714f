"""What every record says of the machine it was made on."""

from __future__ import annotations

from typing import Any

import torch

import cogview_kernels


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the host's name is nobody's business
    cpu = machine_info.pop("cpu", {})
    machine_info["cpu"] = {"brand_raw": cpu.get("brand_raw"), "arch": cpu.get("arch")}
    cuda = torch.cuda.is_available()
    machine_info["device"] = torch.cuda.get_device_name() if cuda else cpu.get("brand_raw", "CPU")
    machine_info["threads"] = torch.get_num_threads()
    machine_info["torch"] = torch.__version__
    machine_info["cogview_kernels"] = cogview_kernels.__version__


def pytest_benchmark_update_commit_info(config: Any, commit_info: dict[str, Any]) -> None:
    for name in ("project", "branch", "author_time"):
        commit_info.pop(name, None)
