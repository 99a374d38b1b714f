import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cogview.files import atomic_write, exclusive


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_writes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "new" / "metrics.json"
    for text in ("old", "new"):
        with atomic_write(target) as temporary:
            assert temporary.parent == target.parent and temporary.suffix == ".json"
            temporary.write_text(text)
        assert target.read_text() == text
    assert os.listdir(target.parent) == ["metrics.json"]


def test_an_error_in_the_block_leaves_the_previous_file_and_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(KeyError), atomic_write(target) as temporary:
        temporary.write_bytes(b"half of the n")
        raise KeyError("stop")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_full_disk_names_the_file_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=r"a\.bin.*No space left.*previous file is intact") as caught:
        with atomic_write(target) as temporary:
            temporary.write_bytes(b"new")
    assert caught.value.errno == errno.ENOSPC
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_torch_save_into_a_file_that_cannot_grow_is_an_os_error(tmp_path: Path) -> None:
    """The system itself refuses the bytes (a file size limit), in the middle of torch.save."""
    target = tmp_path / "a.pt"
    target.write_bytes(b"old")
    result = run(
        """
        import resource, signal, sys, torch
        from cogview.files import atomic_write, exclusive

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            with atomic_write(sys.argv[1]) as temporary, open(temporary, "wb") as file:
                torch.save(torch.zeros(1_000_000), file)
        except OSError as error:
            print(error)
        """,
        target,
    )
    assert "a.pt: not saved: File too large; the previous file is intact" in result.stdout, result
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.pt"]


def test_kill_in_the_middle_keeps_the_previous_file_and_the_next_write_cleans(
    tmp_path: Path,
) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    result = run(
        """
        import os, signal, sys
        from cogview.files import atomic_write, exclusive

        with atomic_write(sys.argv[1]) as temporary:
            temporary.write_bytes(b"half" * 1000)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        target,
    )
    assert result.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == [".a.partial.bin", "a.bin"]
    with atomic_write(target) as temporary:
        assert temporary.read_bytes() == b""
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_second_writer_is_refused_and_does_not_disturb_the_first(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"first")
        with pytest.raises(OSError, match=r"a\.bin: not saved: another process is writing it"):
            with atomic_write(target):
                pass
    assert target.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_folder_as_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(IsADirectoryError, match="out: not saved"), atomic_write(tmp_path / "out"):
        pass


def test_a_file_as_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(OSError, match=r"run/a\.bin: not saved"),
        atomic_write(tmp_path / "run/a.bin"),
    ):
        pass


def test_a_forked_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    """The workers of a training that is killed live on for a few seconds."""
    reading, writing = os.pipe()
    with exclusive(tmp_path / ".lock"):
        child = os.fork()
        if child == 0:
            os.write(writing, b"here")
            signal.pause()
    os.read(reading, 4)
    try:
        with exclusive(tmp_path / ".lock"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    said = f"its file system cannot lock files: Function not implemented: '{tmp_path}'"
    with pytest.raises(OSError, match=re.escape(said)), exclusive(tmp_path / ".lock"):
        pass
