import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.cli import main
from cogview.config import load_config

SMALL = [
    "device=cpu",
    "text_tokenizer.vocab_size=20",
    "image_tokenizer.image_size=16",
    "image_tokenizer.channels=3",
    "image_tokenizer.hidden=8",
    "image_tokenizer.num_downsamples=2",
    "image_tokenizer.codebook_size=16",
    "image_tokenizer.codebook_dim=8",
    "image_training.steps=5",
    "image_training.batch_size=4",
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_heads=2",
    "model.max_positions=40",
    "model.query_window=4",
    "model.num_pivots=4",
    "training.steps=4",
    "training.warmup_steps=0",
    "training.batch_size=4",
    "training.save_every=2",
    "training.eval_every=2",
]
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 220),
    "white": (250, 250, 250),
}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = []
    for name, colour in COLOURS.items():
        for number in range(3):
            file = f"{name}{number}.png"
            Image.fromarray(np.full((20, 24, 3), colour, np.uint8)).save(folder / file)
            lines.append(f"{file}\ta {name} wall number {number}\n")
    (folder / "captions.tsv").write_text("".join(lines))
    return folder


def sets(*settings):
    return [argument for setting in settings for argument in ("--set", setting)]


def cogview(*arguments):
    return main([str(argument) for argument in arguments])


def trained(tmp_path, photos, *settings):
    run = tmp_path / "run"
    settings = sets(*SMALL, *settings)
    assert (
        cogview(
            "train-text-tokenizer", "--run", run, "--data", photos, "--preset", "small", *settings
        )
        == 0
    )
    assert cogview("train-image-tokenizer", "--run", run, "--data", photos) == 0
    assert cogview("encode", "--run", run, "--data", photos) == 0
    assert cogview("train", "--run", run) == 0
    return run


def test_from_a_folder_of_photos_to_drawings(tmp_path, photos, capsys):
    run = trained(tmp_path, photos)
    assert "step 4, held-out loss: image" in capsys.readouterr().out
    assert cogview("sample", "--run", run, "a red wall", "a blue wall", "--num", 2) == 0
    drawings = sorted((run / "samples").glob("0*.png"))
    assert len(drawings) == 4 and (run / "samples" / "grid.png").is_file()
    with Image.open(drawings[0]) as image:
        assert image.size == (16, 16) and image.mode == "RGB"

    captions = tmp_path / "captions.txt"
    captions.write_text("a green wall\n\na white wall\n")
    out = tmp_path / "half"
    photo = photos / "red0.png"
    assert (
        cogview(
            "sample", "--run", run, "--file", captions, "--image", photo, "--keep", 8, "--out", out
        )
        == 0
    )
    assert len(list(out.glob("0*.png"))) == 2

    assert cogview("train", "--run", run, "--set", "training.steps=6") == 0
    assert "resuming from step 4" in capsys.readouterr().out
    assert load_config(run / "config.yaml").training.steps == 6
    wrong = error(capsys, "sample", "--run", run, "a wall", "--set", "model.attention=three_region")
    assert "model.attention: " in wrong and "with dense, got three_region" in wrong
    assert cogview("sample", "--run", run, "a red wall", "--set", "sampling.temperature=0") == 0
    # `sample` does not save its settings.
    assert load_config(run / "config.yaml").sampling.temperature == 1.0


def test_captions_from_images(tmp_path, photos, capsys, monkeypatch):
    run = trained(tmp_path, photos, "training.task=captioning")
    capsys.readouterr()
    assert (
        cogview("caption", "--run", run, photos / "red0.png", photos / "blue0.png", "--quiet") == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [
        str(photos / "red0.png"),
        str(photos / "blue0.png"),
    ]
    options = {}
    monkeypatch.setattr(
        "cogview.run.write_captions", lambda *_, **given: options.update(given) or [[]]
    )
    assert cogview("caption", "--run", run, photos / "red0.png", "--quiet") == 0
    assert options == {"progress": False}


def error(capsys, *arguments):
    """The one line on standard error of a command that fails."""
    capsys.readouterr()
    assert cogview(*arguments, "--quiet") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("cogview: error: ")
    return lines[0]


def test_errors_are_one_line_that_names_the_cause(tmp_path, photos, capsys):
    run, new = tmp_path / "run", ["--preset", "small", *sets(*SMALL)]
    text = ["train-text-tokenizer", "--run", run, "--data", photos]
    assert "expected config.yaml in it, got none" in error(capsys, *text)
    assert "'smal' is neither a preset" in error(capsys, *text, "--preset", "smal")
    assert "unknown key 'stepz' in training" in error(
        capsys, *text, *new, *sets("training.stepz=1")
    )
    assert "text_tokenizer.vocab_size: expected at most " in error(
        capsys, *text, *new, *sets("text_tokenizer.vocab_size=5000")
    )
    assert not (run / "config.yaml").exists()  # settings that did not work are not kept
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text("seed: 1\n")  # settings without any results yet
    assert cogview(*text, *new) == 0
    assert load_config(run / "config.yaml").seed == 0
    assert "config.yaml already holds the settings" in error(capsys, *text, "--preset", "small")
    assert "image_tokenizer.pt" in error(capsys, "encode", "--run", run, "--data", photos)
    assert "run cogview encode first" in error(
        capsys, "train", "--run", run, "--set", "training.steps=9"
    )
    assert load_config(run / "config.yaml").training.steps == 4

    assert cogview("train-image-tokenizer", "--run", run, "--data", photos, "--quiet") == 0
    assert "expected a checkpoint in it, got none; run cogview train first" in error(
        capsys, "sample", "--run", run, "a wall"
    )
    assert "expected at least one, on the command line" in error(capsys, "sample", "--run", run)
    assert "caption: expected some text, got ' '" in error(capsys, "sample", "--run", run, " ")
    captions = tmp_path / "captions.txt"
    captions.write_bytes("ein grüner Stein".encode("latin-1"))
    assert "captions.txt: expected UTF-8 text" in error(
        capsys, "sample", "--run", run, "--file", captions
    )
    assert f"--out: expected a folder that can be written to, got {captions}" in error(
        capsys, "sample", "--run", run, "a wall", "--out", captions / "drawings"
    )
    said = error(capsys, "sample", "--run", run, "a wall", f"the {'red ' * 30}wall")
    assert "caption: expected at most 20 pieces" in said and "in 'the red red" in said
    assert "--num: expected 1 or more, got 0" in error(
        capsys, "sample", "--run", run, "a", "--num", 0
    )
    assert "expected captioning to write captions" in error(
        capsys, "caption", "--run", run, photos / "red0.png"
    )
    wrong = "image_tokenizer.codebook_size=32"
    refused = error(capsys, "encode", "--run", run, "--data", photos, "--set", wrong)
    assert "image_tokenizer.codebook_size: " in refused and "has 16, the settings say 32" in refused
    assert (
        cogview(
            "encode", "--run", run, "--data", photos, "--set", "image_tokenizer.codebook_size=16"
        )
        == 0
    )

    (photos / "green1.png").write_bytes((photos / "green1.png").read_bytes()[:60])
    tokens = sorted((run / "tokens").iterdir())
    assert "1 of 12 records cannot be used" in error(
        capsys, "encode", "--run", run, "--data", photos
    )
    assert sorted((run / "tokens").iterdir()) == tokens
    assert "green1.png" in (run / "bad_records.txt").read_text()
    assert cogview("encode", "--run", run, "--data", photos, "--skip-bad") == 0
    captured = capsys.readouterr()
    assert "11 captions of 11 images" in captured.out and "cogview: warning:" in captured.err
    assert f"data: {photos / 'captions.tsv'}: a table with the columns" in captured.out
    (photos / "captions.tsv").write_text("red0.png\t\n")
    assert "captions.tsv:1: expected a caption for" in error(
        capsys, "encode", "--run", run, "--data", photos
    )
    assert "no such file or folder" in error(
        capsys, "encode", "--run", run, "--data", tmp_path / "nowhere"
    )


def test_errors_name_what_to_change(tmp_path, photos, capsys, monkeypatch):
    run, file = tmp_path / "run", tmp_path / "file.txt"
    file.write_bytes(b"caf\xe9\n")
    new = ["--data", photos, "--preset", "small", *sets(*SMALL)]
    assert cogview("train-text-tokenizer", "--run", run, *new) == 0
    grey = [*new, *sets("image_tokenizer.channels=2")]
    for command, message in (
        (["train-text-tokenizer", "--run", file, *new], "--run: expected a folder, got a file"),
        (["train-image-tokenizer", "--run", tmp_path / "new", *grey], "image_tokenizer.channels: "),
        (["encode", "--run", run, "--data", photos], "cogview train-image-tokenizer makes it"),
        (["sample", "--run", run, "--file", file], "file.txt: expected UTF-8 text"),
    ):
        assert message in error(capsys, *command)
    large = sets("image_training.batch_size=50")
    (photos / "captions.tsv").open("a").write(f"red0.png\t{'a long red wall ' * 40}\n")
    assert cogview("train-image-tokenizer", "--run", run, "--data", photos, *large) == 0
    assert "image_training.batch_size: 50 examples per step, of 9 in all" in capsys.readouterr().err
    assert cogview("encode", "--run", run, "--data", photos) == 0
    assert "a larger model.max_positions leaves more room" in capsys.readouterr().out
    for name, raised, message in (
        (
            "cogview.run.Run.open",
            torch.OutOfMemoryError("full"),
            "full; try a smaller training.mic",
        ),
        (
            "cogview.run.Run.open",
            ModuleNotFoundError(name="yaml"),
            "yaml is not installed; run pip",
        ),
    ):
        raise_in(monkeypatch, name, raised)
        assert message in error(capsys, "train", "--run", run)


def test_a_text_tokenizer_from_captions_alone(tmp_path, capsys):
    captions = tmp_path / "captions.txt"
    captions.write_text("".join(f"a wall of {n} bricks\n" for n in range(20)))
    data = ["--run", tmp_path / "run", "--data", captions]
    settings = sets(*SMALL, "text_tokenizer.vocab_size=24")
    assert cogview("train-text-tokenizer", *data, "--preset", "small", *settings) == 0
    assert "captions.txt: captions alone, one a line" in capsys.readouterr().out
    assert "captions.txt:1: expected an image, got a caption alone" in error(
        capsys, "train-image-tokenizer", *data
    )


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert cogview("train", "--run", tmp_path, "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def raise_in(monkeypatch, name, raised):
    def function(*_, **__):
        raise raised

    monkeypatch.setattr(name, function)


@pytest.mark.parametrize(
    "raised, message",
    [
        (RuntimeError("bad shape\nin a kernel"), "bad shape in a kernel"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_errors_of_libraries_are_one_line(monkeypatch, capsys, raised, message):
    raise_in(monkeypatch, "cogview.config.load_config", raised)
    assert error(capsys, "info", "digits") == f"cogview: error: {message}"
    assert cogview("info", "digits", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_says_what_the_same_command_does(tmp_path, monkeypatch, capsys):
    raise_in(monkeypatch, "cogview.config.load_config", KeyboardInterrupt())
    raise_in(monkeypatch, "cogview.run.load_config", KeyboardInterrupt())
    (tmp_path / "config.yaml").write_text("")
    for command in (["demo"], ["train", "--run", tmp_path]):
        assert cogview(*command) == 130
        assert "the same command resumes from the newest checkpoint" in capsys.readouterr().err
    assert cogview("encode", "--run", tmp_path, "--data", tmp_path) == 130
    assert "the same command starts from the beginning" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m cogview info digits | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout == "141\n" and result.stderr == ""


def test_demo_leaves_a_folder_with_other_data_untouched(tmp_path, capsys):
    files = {name: tmp_path / name for name in ("config.yaml", "tokens", "image_tokenizer.pt")}
    for path in files.values():
        path.write_text("the user's")
    demo = ["demo", "--out", tmp_path]
    assert "image_tokenizer.image_size: expected 64" in error(
        capsys, *demo, "--set", "image_tokenizer.image_size=32"
    )
    assert "image_tokenizer.channels: expected 1" in error(
        capsys, *demo, "--set", "image_tokenizer.channels=3"
    )
    assert "holds a run on other data" in error(capsys, *demo)
    assert {path.read_text() for path in files.values()} == {"the user's"}


def test_demo_deletes_the_results_of_an_earlier_one(tmp_path, monkeypatch):
    earlier = ["metrics.json", "samples.png", "curves.png", "image_tokenizer.pt", "metrics.jsonl"]
    for name in [*earlier, "notes.txt"]:
        (tmp_path / name).write_text("{}")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cogview.demo.main.make_scenes", stop)
    assert cogview("demo", "--out", tmp_path) == 130
    left = {".demonstration", ".lock", "config.yaml", "notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == left
    # The same settings: it goes on. Others: it begins anew.
    (tmp_path / "image_tokenizer.pt").write_text("of the first part")
    assert cogview("demo", "--out", tmp_path) == 130
    assert (tmp_path / "image_tokenizer.pt").exists()
    assert cogview("demo", "--out", tmp_path, "--set", "seed=1") == 130
    assert not (tmp_path / "image_tokenizer.pt").exists()


def test_info_lists_presets_and_shows_settings(capsys):
    assert cogview("info") == 0
    assert "3,928,849,920" in capsys.readouterr().out
    assert cogview("info", "digits", "--set", "training.steps=17") == 0
    assert "steps: 17" in capsys.readouterr().out


def test_help_shows_a_first_command():
    result = subprocess.run(
        [sys.executable, "-m", "cogview", "--help"], capture_output=True, text=True, check=True
    )
    assert "cogview demo --out results/demo" in result.stdout
