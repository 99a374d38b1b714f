import os

# Before torch is loaded: threads that spin while they wait take the cores from those that work,
# as soon as anything else runs on the machine (measured on two shared cores: 2.7 times slower).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from cogview.cli import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
