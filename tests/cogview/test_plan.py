import pytest

from cogview.cli import main
from cogview.config import load_config
from cogview.plan import plan

LAYERS = 6
SETTINGS = [
    f"model.num_layers={LAYERS}",
    "model.hidden_size=256",
    "model.num_heads=4",
    "model.activation_checkpointing=true",
    "training.batch_size=16",
    "training.micro_batch_size=2",
]


def config(*settings):
    return load_config("digits", [*SETTINGS, "training.precision=bfloat16", *settings])


def test_shards_and_whole_copies():
    whole = plan(config(), 2)
    sharded = plan(config("training.parallel=fsdp"), 2)
    parameters = whole.memory["parameters"]
    assert whole.micro_batch_size == sharded.micro_batch_size == 2
    assert whole.passes == sharded.passes == 4
    for name in ("gradients", "optimizer", "parameters"):
        size = 2 * parameters if name == "optimizer" else parameters
        assert whole.memory[name] == pytest.approx(size, rel=0.01)
        assert sharded.memory[name] == pytest.approx(size / 2, rel=0.01)
    assert whole.gathered == 0 and whole.reduced == parameters
    assert whole.memory["gathered weights"] == 0
    # Float32 gradients once per pass; weights in bfloat16, twice: forward and backward.
    layer = 12 * 256**2
    embeddings = parameters / 4 - LAYERS * layer
    assert sharded.reduced == pytest.approx(4 * (4 * parameters / 4) / 2, rel=0.02)
    expected = 4 * (2 * 2 * LAYERS * layer + 4 * embeddings) / 2
    assert sharded.gathered == pytest.approx(expected, rel=0.05)
    # A layer is freed behind the norm that it ends with: not all of them stay gathered.
    gathered = sharded.memory["gathered weights"]
    assert 4 * embeddings <= gathered < 4 * embeddings + 2 * 3 * layer


def test_a_larger_micro_batch_takes_more_activations():
    small, large = (plan(config(f"training.micro_batch_size={size}"), 1) for size in (2, 4))
    grown = [p.memory["activations"] + p.memory["temporary"] for p in (small, large)]
    assert 1.3 * grown[0] < grown[1] < 2.1 * grown[0]


def test_activation_checkpointing_keeps_no_copy_of_the_weights():
    """A layer more keeps its input, and no weights in half precision."""
    few, many = (
        plan(config("training.micro_batch_size=1", f"model.num_layers={LAYERS + more}"), 1)
        for more in (0, LAYERS)
    )
    grown = [p.memory["activations"] + p.memory["temporary"] for p in (few, many)]
    assert (grown[1] - grown[0]) / LAYERS < 12 * 256**2 * 2


def test_the_command(capsys):
    sets = [argument for setting in SETTINGS for argument in ("--set", setting)]
    assert main(["plan", "--preset", "digits", "--gpus", "4", *sets]) == 0
    out = capsys.readouterr().out
    assert "digits, 4 GPUs, fsdp: 2 passes of 2 sequences" in out
    assert "gathered weights" in out and "arrives per step, gradients" in out
    assert main(["plan", "--preset", "digits", "--gpus", "3", *sets]) == 2
    assert "training.batch_size: expected a multiple of 3 GPUs" in capsys.readouterr().err
