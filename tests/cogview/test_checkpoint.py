import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from cogview.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    load_weights,
    prune_checkpoints,
    save_checkpoint,
)


def state(step, size=1000):
    return {"step": step, "model": {"weight": torch.full((size,), float(step))}}


def test_saving_and_loading(tmp_path):
    save_checkpoint(checkpoint_path(tmp_path, 7), state(7))
    loaded = load_checkpoint(tmp_path / "step_00000007.pt")
    assert loaded["step"] == 7 and torch.equal(loaded["model"]["weight"], torch.full((1000,), 7.0))


def test_newest_first_and_pruning(tmp_path):
    for step in (9, 100_000_000, 10):
        save_checkpoint(checkpoint_path(tmp_path, step), state(step))
    (tmp_path / ".step_00000011.partial.pt").write_bytes(b"left by a killed run")
    (tmp_path / "step_best.pt").write_bytes(b"another program's file")
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step_100000000.pt", "step_00000010.pt", "step_00000009.pt",
    ]  # fmt: skip
    assert load_latest(tmp_path)["step"] == 100_000_000
    prune_checkpoints(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_100000000.pt"]
    assert (tmp_path / "step_best.pt").exists()
    assert load_latest(tmp_path / "nowhere") is None


def damage_cut(data):
    return data[: len(data) // 2]


def damage_flip(data):
    at = data.index(torch.full((4,), 7.0).numpy().tobytes())  # one bit of a weight
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage", [damage_cut, damage_flip, lambda data: b"", lambda data: b"\0" * len(data)]
)
def test_a_damaged_file_is_named(tmp_path, damage):
    path = checkpoint_path(tmp_path, 7)
    save_checkpoint(path, state(7))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="step_00000007.pt: truncated or damaged checkpoint"):
        load_checkpoint(path)


def test_every_damaged_byte_of_the_directory_is_a_damaged_file(tmp_path):
    path = checkpoint_path(tmp_path, 7)
    save_checkpoint(path, state(7))
    data = path.read_bytes()
    for at in range(data.index(b"PK\x01\x02"), len(data)):  # where the archive's directory begins
        for mask in (0x01, 0xFF):
            path.write_bytes(data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :])
            try:
                assert load_checkpoint(path)["step"] == 7  # some bytes do not matter
            except ValueError as error:
                assert "step_00000007.pt: " in str(
                    error
                )  # or torch read a weight that is not finite


@pytest.mark.parametrize("error", [OSError(22, "Invalid argument"), NotImplementedError()])
def test_what_readers_raise_on_damaged_bytes(tmp_path, monkeypatch, error):
    for step in (1, 2):
        save_checkpoint(checkpoint_path(tmp_path, step), state(step))
    load = torch.load

    def load_or_raise(path, **options):
        if path.name == "step_00000002.pt":
            raise error
        return load(path, **options)

    monkeypatch.setattr(torch, "load", load_or_raise)
    reason = str(error) or "NotImplementedError"
    with pytest.warns(UserWarning) as warned:
        assert load_latest(tmp_path)["step"] == 1
    assert f"step_00000002.pt: truncated or damaged checkpoint: {reason}" in str(warned[0].message)
    error = PermissionError(13, "Permission denied")
    with pytest.raises(PermissionError):
        load_checkpoint(tmp_path / "step_00000002.pt")


def test_another_kind_of_file_is_named(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match="other.pt: expected a checkpoint of format cogview-checkpoint-2"
    ):
        load_checkpoint(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="missing.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "missing.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt: truncated or damaged"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "evil").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    path = checkpoint_path(tmp_path, 1)
    save_checkpoint(path, state(1))
    bad = state(2)
    bad["model"]["weight"][5] = float("nan")
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        save_checkpoint(path, bad)
    assert load_checkpoint(path)["step"] == 1
    torch.save({"format": "cogview-checkpoint-2", **bad}, path)
    with pytest.raises(ValueError, match="step_00000001.pt: weight holds NaN or infinity"):
        load_checkpoint(path)


def test_load_weights_names_what_does_not_fit():
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(
        ValueError,
        match=r"here: .*missing bias; unknown scale; weight: expected \(2, 3\), got \(2, 4\)",
    ):
        load_weights(model, {"weight": torch.zeros(2, 4), "scale": torch.zeros(1)}, "here")
    assert torch.equal(model.weight, before)
    load_weights(model, {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, "here")
    assert torch.equal(model.weight, torch.ones(2, 3))


WRITER = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from cogview.checkpoint import checkpoint_path, save_checkpoint
weight = torch.randn(4_000_000)
print("ready", flush=True)
step = 2
while True:
    save_checkpoint(checkpoint_path(sys.argv[1], step), {"step": step, "model": {"weight": weight}})
    step += 1
"""


def test_kill_9_in_the_middle_of_a_save_loses_nothing(tmp_path):
    save_checkpoint(checkpoint_path(tmp_path, 1), state(1))
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), os.getcwd()], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 60
    while not any(
        path.stat().st_size > 1_000_000
        for path in tmp_path.glob(".step_*.partial.pt")
        if path.exists()
    ):
        assert time.monotonic() < deadline
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    for path in list_checkpoints(tmp_path):  # every file with a final name is complete
        load_checkpoint(path)
    latest = load_latest(tmp_path)["step"]
    save_checkpoint(checkpoint_path(tmp_path, latest + 1), state(latest + 1))
    assert load_latest(tmp_path)["step"] == latest + 1
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    path = checkpoint_path(tmp_path, 1)
    save_checkpoint(path, state(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match="step_00000001.pt: not saved: .*the previous file is intact"
        ):
            save_checkpoint(path, state(2, 1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert load_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
