"""The command `cogview`, also as `python -m cogview`."""

import os

# Set before torch is loaded. OpenMP threads spin while they wait; a long spin takes cores away from
# working threads when anything else runs on the machine.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from cogview.cli import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
