"""The command `cogview`, also as `python -m cogview`."""

import os

# Set before torch is loaded. OpenMP threads spin while they wait; a long spin takes cores away from
# working threads when anything else runs on the machine.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

try:
    from cogview.cli import main
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] in ("cogview", "cogview_kernels"):
        raise
    raise SystemExit(
        f"cogview: {error.name} is not installed; the model needs more packages than the kernels: "
        "run pip install '.[cogview]' in a clone of the repository"
    ) from None

if __name__ == "__main__":
    raise SystemExit(main())
