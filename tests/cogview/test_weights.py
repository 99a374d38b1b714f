"""Weights that leave a run and enter another one."""

import json
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import SMALL, cogview, error, photos, sets, trained  # noqa: F401

from cogview.checkpoint import list_checkpoints, load_checkpoint
from cogview.config import load_config
from cogview.run import Run
from cogview.weights import load_weights_file, save_tensors


def test_a_full_disk_is_named(tmp_path):
    """A limit on the size of files stands for the disk."""
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.zeros(9)})
    before, (_, most) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
    try:
        with pytest.raises(OSError, match="a.safetensors: not saved: .*File too large.* is intact"):
            save_tensors(path, {"a": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def newest(run):
    return load_checkpoint(list_checkpoints(run / "checkpoints")[0])


def test_an_exported_run_draws_the_same_and_other_programs_read_it(tmp_path, photos, capsys):  # noqa: F811
    run, out = trained(tmp_path, photos), tmp_path / "out"
    assert cogview("export", "--run", run, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "config.yaml",
        "image_tokenizer.pt",
        "image_tokenizer.safetensors",
        "model.safetensors",
        "text_tokenizer.model",
    ]
    texts = ["a red wall", "a blue wall"]
    drawn = Run.open(run).draw(texts)
    assert torch.equal(Run.open(out).draw(texts), drawn)

    # Another program: safetensors alone.
    state = newest(run)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(state["model"])
    assert json.loads(metadata["config"])["model"]["num_layers"] == 1
    assert json.loads(metadata["made_from"]) == state["made_from"] and metadata["step"] == "4"
    tensors = load_file(out / "image_tokenizer.safetensors")
    assert torch.equal(tensors["dec.blocks.0.weight"],
                       Run.open(run).image_tokenizer().dec.blocks[0].weight)  # fmt: skip

    half = tmp_path / "half"
    assert cogview("export", "--run", run, "--out", half, "--dtype", "bfloat16") == 0
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (out, half)]
    assert sizes[1] < 0.6 * sizes[0]
    assert Run.open(half).draw(texts).shape == drawn.shape
    capsys.readouterr()
    assert "--out: expected a new folder" in error(capsys, "export", "--run", run, "--out", out)

    # A tokenizer that is not the one of the weights, and damaged bytes, are errors.
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[:-9] + bytes(9))
    assert "damaged: the weights are not those" in error(capsys, "sample", "--run", out, "a wall")
    (out / "model.safetensors").write_bytes(whole[:-9])
    assert "expected weights in the format safetensors" in error(
        capsys, "sample", "--run", out, "a wall"
    )
    (out / "model.safetensors").write_bytes(whole)
    other = tmp_path / "other"
    assert (
        cogview("train-image-tokenizer", "--run", other, "--data", photos, "--preset", "small",
                *sets(*SMALL, "seed=3")) == 0
    )  # fmt: skip
    (out / "image_tokenizer.pt").write_bytes((other / "image_tokenizer.pt").read_bytes())
    assert "another image tokenizer" in error(capsys, "sample", "--run", out, "a wall")
    (other / "text_tokenizer.model").write_bytes((run / "text_tokenizer.model").read_bytes())
    wrong = error(capsys, "encode", "--run", other, "--init-from", run, "--data", photos)
    assert "another image tokenizer" in wrong and not (other / "model.safetensors").exists()


@pytest.mark.parametrize("source", ["run", "exported/model.safetensors"])
def test_a_new_run_starts_from_the_weights_of_another(tmp_path, photos, capsys, source):  # noqa: F811
    """Captioning from text to image, with longer sequences, on other data."""
    run = trained(tmp_path, photos)
    cogview("export", "--run", run, "--out", tmp_path / "exported")
    new = tmp_path / "new"
    changes = sets("training.task=captioning", "model.max_positions=44",
                   "training.final_learning_rate=0", "training.learning_rate=1e-30",
                   "training.weight_decay=0")  # fmt: skip
    init = ("--init-from", tmp_path / source)
    assert cogview("encode", "--run", new, *init, "--data", photos, *changes) == 0
    assert load_config(new / "config.yaml").training.task == "captioning"
    capsys.readouterr()
    assert cogview("train", "--run", new) == 0

    before, after = newest(run), newest(new)
    assert after["step"] == 4 and after["examples"] == 16  # the optimizer and the data start fresh
    for name, weight in before["model"].items():  # the learning rate is 1e-30
        assert torch.equal(after["model"][name][: len(weight)], weight), name
    rows = after["model"]["transformer.position_embeddings.weight"][40:]
    assert len(rows) == 4 and 0 < rows.std() < 1
    fingerprint = load_weights_file(new / "model.safetensors").fingerprint
    assert after["made_from"]["initial weights"] == f"{fingerprint}, step 4"
    capsys.readouterr()
    assert cogview("info", new) == 0
    assert f"initial weights: {fingerprint}, step 4" in capsys.readouterr().out

    # The same command again resumes, also when the other run has gone; another start is refused.
    assert cogview("train", "--run", new, *init, "--set", "training.steps=5") == 0
    assert "resuming from step 4" in capsys.readouterr().out
    assert cogview("train", "--run", run, "--set", "training.steps=6") == 0
    capsys.readouterr()
    wrong = error(capsys, "train", "--run", new, "--init-from", run)
    assert "holds a run that did not start from these weights" in wrong
    (new / "model.safetensors").unlink()
    assert cogview("train", "--run", new, "--set", "training.steps=6") == 0
    assert newest(new)["made_from"]["initial weights"] == f"{fingerprint}, step 4"


def test_tokens_of_the_other_run_are_taken_over_by_train(tmp_path, photos):  # noqa: F811
    run, new = trained(tmp_path, photos), tmp_path / "new"
    changes = sets("training.task=captioning", "training.steps=2")
    assert cogview("train", "--run", new, "--init-from", run, *changes) == 0
    assert newest(new)["made_from"]["tokens"] == newest(run)["made_from"]["tokens"]


def test_weights_that_do_not_fit_name_the_setting(tmp_path, photos, capsys):  # noqa: F811
    run = trained(tmp_path, photos)
    capsys.readouterr()

    def complaint(*settings, source=run):
        new = tmp_path / "new"
        text = error(capsys, "train", "--run", new, "--init-from", source, *sets(*settings))
        assert not settings or not new.exists()
        return text

    for key, value in (
        ("text_tokenizer.vocab_size", 21),
        ("image_tokenizer.codebook_size", 32),
        ("model.hidden_size", 32),
        ("model.num_layers", 2),
        ("model.norm", "pre"),
    ):
        assert f"error: {key}: " in complaint(f"{key}={value}")
    wrong = complaint("model.max_positions=36")
    assert "model.max_positions: " in wrong and "has 40, got 36" in wrong
    assert "expected a run folder or a folder of cogview export" in complaint(source=tmp_path)
    bare = tmp_path / "exported" / "model.safetensors"
    assert cogview("export", "--run", run, "--out", bare.parent) == 0
    bare.write_bytes(b"PK something else")
    assert "expected weights in the format safetensors" in complaint(source=bare)
    save_file({"weight": torch.ones(2)}, bare)  # of another program
    new = tmp_path / "new"
    assert cogview("train", "--run", new, "--init-from", bare, "--quiet") == 2
    assert "weights do not fit the model: missing word_embeddings.weight" in capsys.readouterr().err
