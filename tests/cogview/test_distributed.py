"""Training on several processes: what torchrun starts, with Gloo on the CPU."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_train
import torch

from cogview import distributed
from cogview.checkpoint import (
    ShardedSave,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    prune_checkpoints,
    restore,
    training_state,
)
from cogview.cli import main
from cogview.data.tokens import TokenDataset
from cogview.image_tokenizer import ImageTokenizer
from cogview.loop import read_metrics
from cogview.run import Run
from cogview.text_tokenizer import TextTokenizer

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 800  # seconds, for a busy machine
EVERY = ("training.micro_batch_size=1", "training.save_every=3", "model.num_layers=3")


STARTED = []


@pytest.fixture(autouse=True)
def no_process_is_left():
    """A test that fails ends what it started."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.terminate()
            process.communicate()


def torchrun(processes, *arguments, **variables):
    """Starts a module or a script; `communicate` waits for its end."""
    port = ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-m", "torch.distributed.run", *port]
    process = subprocess.Popen(
        [*command, f"--nproc_per_node={processes}", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    STARTED.append(process)
    return process


def train(processes, *jobs):
    """Each job: a folder, or `old->new` to go on in a copy of an old one, and settings.

    Returns:
        for each process and job, how many weights it held, and of how many.
    """
    process = torchrun(processes, __file__, *(" ".join(map(str, job)) for job in jobs))
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return [tuple(map(int, pair)) for pair in re.findall(r"<(\d+)/(\d+)>", out)]


def copy_before_last_checkpoint(old, new):
    shutil.copytree(old, new)
    newest = list_checkpoints(Path(new) / "checkpoints")[0]
    shutil.rmtree(newest) if newest.is_dir() else newest.unlink()


if __name__ == "__main__":  # one process of `train`
    torch.set_num_threads(1)
    with distributed.processes("cpu"):
        for job in sys.argv[1:]:
            folder, *settings = job.split()
            old, _, new = folder.partition("->")
            with distributed.first_before_others():
                if new and distributed.is_first():
                    copy_before_last_checkpoint(old, new)
            run = test_train.trainer(test_train.config(*EVERY, *settings), new or old)
            assert run.step == (3 if new else 0)
            run.run()
            parameters = list(run.model.parameters())
            held = sum(getattr(p, "_local_tensor", p).numel() for p in parameters)
            print(f"<{held}/{sum(p.numel() for p in parameters)}>")


def metrics(folder):
    return test_train.without_seconds(folder)


def assert_close(ours, theirs, rel=2e-5):
    """Losses and gradient norms of all steps, up to the rounding of sums."""
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if b[name] is not None:
                # The caption gap is a small difference of losses.
                size = b["held_out_loss"] if name == "held_out_caption_gap" else b[name]
                assert abs(a[name] - b[name]) <= rel * abs(size), (a["step"], name)
            else:  # a step that float16 skips
                assert a[name] is None
    assert sum(row["grad_norm"] is not None for row in ours) > 2


def assert_same_weights(ours, theirs):
    weights = [load_latest(folder / "checkpoints")["model"] for folder in (ours, theirs)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        if name.endswith("query_key_value.bias"):
            continue  # no softmax depends on the keys' bias: its gradient is rounding
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-6)


DDP, FSDP = "training.parallel=ddp", "training.parallel=fsdp"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same training by one process, and by two with either way to spread; one of these also
    resumed from its first checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    test_train.trainer(test_train.config(*EVERY), folder / "one").run()
    held = train(
        2,
        (folder / "ddp", DDP),
        (folder / "fsdp", FSDP, "training.async_checkpoints=true"),
        (f"{folder / 'fsdp'}->{folder / 'resumed'}", FSDP),
    )
    # Under ddp, both processes hold all.
    assert len(held) == 6 and sum(part == whole for part, whole in held) == 2
    assert all(part == whole or part < 0.6 * whole for part, whole in held)
    return folder


@pytest.mark.timeout(900)  # seconds, but for a busy machine
def test_several_processes_compute_what_one_does(folders):
    """With dropout and pivots: they depend on the micro batch, not on the process."""
    expected = metrics(folders / "one")
    assert len({row["grad_norm"] for row in expected}) == 6
    assert_close(metrics(folders / "ddp"), expected)
    assert_close(metrics(folders / "fsdp"), expected)
    assert metrics(folders / "resumed") == metrics(folders / "fsdp")  # bit for bit


def test_saved_on_two_loaded_on_one(folders, tmp_path):
    copy_before_last_checkpoint(folders / "fsdp", tmp_path / "one")
    run = test_train.trainer(test_train.config(*EVERY), tmp_path / "one")
    assert run.step == 3
    run.run()
    assert_close(metrics(tmp_path / "one"), metrics(folders / "one"))
    assert_same_weights(tmp_path / "one", folders / "one")
    assert_same_weights(folders / "fsdp", folders / "one")  # what `Run.model` reads


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_saved_on_two_loaded_on_four(folders, tmp_path):
    """A file and a folder, for either way to spread."""
    ways = {"fsdp": FSDP, "ddp": DDP}
    jobs = [("fsdp", "fsdp"), ("fsdp", "ddp"), ("ddp", "fsdp")]
    names = [tmp_path / f"{old}_{new}" for old, new in jobs]
    train(
        4,
        *(
            (f"{folders / old}->{name}", ways[new])
            for (old, new), name in zip(jobs, names, strict=True)
        ),
    )
    for name in names:
        assert_close(metrics(name), metrics(folders / "one"))
        assert_same_weights(name, folders / "one")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_half_precision_in_shards(tmp_path):
    settings = {
        "bfloat16": ("training.precision=bfloat16", "model.activation_checkpointing=true"),
        "float16": ("training.precision=float16",),
    }
    train(2, *((tmp_path / name, FSDP, *of_name) for name, of_name in settings.items()))
    for name, of_name in settings.items():
        one = tmp_path / f"{name}_one"
        test_train.trainer(test_train.config(*EVERY, *of_name), one).run()
        assert_close(metrics(tmp_path / name), metrics(one), rel=2e-3)


def test_a_batch_that_cannot_be_shared_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "size", lambda: 3)
    with pytest.raises(ValueError, match="training.batch_size: expected a multiple of 3 processes"):
        test_train.trainer(test_train.config(*EVERY), tmp_path)


def test_only_training_runs_on_several_processes(monkeypatch, capsys):
    environment = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["encode", "--run", "here", "--data", "there"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("cogview: error (process 1 of 2): torchrun: expected cogview train")


@pytest.fixture
def one_process_group(tmp_path):
    """This process alone, as under torchrun: its models are sharded among one."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_a_damaged_folder_falls_back_to_the_one_before(tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(torch.nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        state = {"step": step, **training_state(model, optimizer)}
        ShardedSave(checkpoint_path(folder, step, sharded=True), state).finish()
    newest = checkpoint_path(folder, 2, sharded=True)
    good = {path: path.read_bytes() for path in newest.iterdir()}
    assert len(good) == 5
    assert load_checkpoint(newest)["step"] == 2
    for path, content in good.items():
        half = len(content) // 2
        flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        for bad in (flipped, content[:half], None):
            if bad is flipped and path.name == "values.pt":
                continue  # a file as of one process; some of its bytes do not matter
            path.unlink() if bad is None else path.write_bytes(bad)
            with pytest.warns(UserWarning, match="step_00000002.dcp: truncated or damaged"):
                assert load_latest(folder)["step"] == 1
            path.write_bytes(content)
    assert load_latest(folder)["step"] == 2
    with pytest.raises(ValueError, match=r"weight: expected \(5, 4\), got \(4, 4\)"):
        other = torch.nn.Linear(4, 5)
        restore(other, torch.optim.AdamW(other.parameters()),
                load_latest(folder, tensors=False), "here")  # fmt: skip

    (newest / "values.pt").unlink()
    with pytest.warns(UserWarning, match="keeping the damaged file as step_00000002.dcp.damaged"):
        load_latest(folder, set_aside=True)
    prune_checkpoints(folder, 0)
    assert [path.name for path in folder.iterdir()] == ["step_00000002.dcp.damaged"]
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        ShardedSave(newest, {"step": 3, **training_state(model, optimizer)})


@pytest.fixture
def run_folder(tmp_path):
    """A run whose tokens are ready."""
    settings = test_train.config()
    captions = [f"a {colour} wall" for colour in ("red", "green", "blue", "black", "yellow")] * 3
    run = Run(tmp_path / "run", settings)
    TextTokenizer.train(captions, run.text_tokenizer_path, 20)
    image_tokenizer = ImageTokenizer(settings.image_tokenizer).eval()
    image_tokenizer.save(run.image_tokenizer_path)
    images = torch.rand(len(captions), 1, 16, 16)
    text_tokenizer = TextTokenizer.load(run.text_tokenizer_path)
    TokenDataset.encode(
        run.tokens_path, captions, images, text_tokenizer, image_tokenizer, progress=False
    )
    run.save_config()
    return run.path


def wait_for(condition, process, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)


def start(folder, *settings, init=()):
    sets = (argument for setting in settings for argument in ("--set", setting))
    # Behind --, where torchrun does not take --run for its own --run-path.
    return torchrun(2, "-m", "--", "cogview", "train", "--run", folder, "--quiet", *init, *sets)


@pytest.mark.timeout(900)
def test_a_killed_process_ends_all_and_the_run_resumes(run_folder, capsys):
    """Then SIGTERM to torchrun: all stop at the same step, and save it."""
    settings = FSDP, "training.steps=100000", "training.save_every=2", "training.eval_every=100000"
    settings += ("training.pictures_every=3",)
    rows = run_folder / "metrics.jsonl"
    process = start(run_folder, *settings)
    wait_for(lambda: len(read_metrics(rows)) > 4, process)
    first = int((run_folder / ".lock").read_text().split()[1])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = (int(child) for child in children if int(child) != first)
    os.kill(second, signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert err.count("cogview: error (process 0 of 2): another process ended") == 1, err
    assert "Signal 9 (SIGKILL)" in err  # torchrun says which one
    assert not Path(f"/proc/{first}").exists()

    saved = load_latest(run_folder / "checkpoints", tensors=False)["step"]
    assert saved >= 2
    assert (run_folder / "pictures" / "step_00000003.png").is_file()
    process = start(run_folder, *settings)
    wait_for(lambda: len(read_metrics(rows)) > saved + 2, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    stopped = load_latest(run_folder / "checkpoints", tensors=False)["step"]
    assert f"stopped by SIGTERM after step {stopped}, which is saved" in err
    assert len(read_metrics(rows)) == stopped > saved

    # One process draws from what two have saved, and refuses other commands under torchrun.
    assert main(["sample", "--run", str(run_folder), "a red wall", "--quiet"]) == 0
    assert "1 images" in capsys.readouterr().out

    # Another run starts from these weights: the first process makes its folder.
    new = run_folder.with_name("new")
    settings = *settings[:-1], "training.steps=2", "training.pictures_every=0"
    process = start(new, *settings, init=("--init-from", run_folder))
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    state = load_latest(new / "checkpoints")
    assert state["step"] == 2 and "initial weights" in state["made_from"]
