"""The command `cogview`, also as `python -m cogview`."""

import os

# Before torch is loaded: threads that spin while they wait take the cores from those that work,
# as soon as anything else runs on the machine (measured on two shared cores: 2.7 times slower).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    from cogview.cli import main
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] in ("cogview", "cogview_kernels"):
        raise
    raise SystemExit(
        f"cogview: {error.name} is not installed; the model needs more packages than the kernels: "
        "pip install 'cogview-kernels[cogview]'"
    ) from None

if __name__ == "__main__":
    raise SystemExit(main())
