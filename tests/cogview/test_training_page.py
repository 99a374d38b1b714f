"""docs/training.md is true: its commands run, in their order, on a few hundred small images. And
every command and setting that a page or the help names exists."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.cli import DESCRIPTION, _parser, main
from cogview.config import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "training.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = "# Not run by the tests: "
FENCED, FLAGS = r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL
SUFFIXES = ("safetensors", "pt", "model")  # of files, such as `model.safetensors`

# Added to every command that takes a preset. As many codes as the page's commands need, and heads
# that four shards can share.
TINY = [
    "device=cpu",
    "text_tokenizer.vocab_size=60",
    "image_tokenizer.image_size=32",
    "image_tokenizer.hidden=8",
    "image_tokenizer.num_downsamples=1",
    "image_tokenizer.codebook_size=32",
    "image_tokenizer.codebook_dim=8",
    "image_training.steps=4",
    "image_training.batch_size=4",
    "model.num_layers=1",
    "model.hidden_size=256",
    "model.num_heads=4",
    "model.max_positions=300",
    "training.batch_size=4",
    "training.micro_batch_size=2",
    "training.eval_examples=4",
]
SHORT = ["training.steps=4", "training.warmup_steps=1"]  # added to every training


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks of a page."""
    return re.findall(FENCED, text, FLAGS)


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `cogview` command among lines for a shell."""
    for line in text.replace("\\\n", " ").splitlines():
        if re.match(r"\s*(cogview|torchrun.* cogview) ", line):
            words = shlex.split(line, comments=True)
            yield words[words.index("cogview") + 1 :]


def values(words: list[str], option: str) -> list[str]:
    return [value for name, value in zip(words, words[1:], strict=False) if name == option]


def sets(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def make_images(folder: Path, count: int, seed: int) -> None:
    """Small images of noise around a colour, each with a text beside it."""
    generator = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        pixels = generator.integers(0, 60, (32, 40, 3)) + generator.integers(0, 195, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        animal = ("cat", "dog", "bird", "horse")[number % 4]
        caption = f"a {animal} on a mat number {number}\n{number} times a {animal}\n"
        (folder / f"{number}.txt").write_text(caption)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Holds what the page takes for given, and is the current folder."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "photos", 200, seed=0)
    make_images(tmp_path / "drawings", 20, seed=1)
    shutil.copy("photos/0.png", "photo.png")
    Image.open("photos/1.png").save("other.jpg")
    return tmp_path


def run_command(words: list[str]) -> int:
    for setting in values(words, "--set"):
        load_config("small", [setting])  # what is added would hide a wrong value
    if words[0] == "import-released":  # in the place of what cannot be downloaded
        run = Path("runs/mine")
        assert main(f"export --run {run} --released --out {words[1]}".split()) == 0
        for option, name in (
            ("--text-tokenizer", "text_tokenizer.model"),
            ("--image-tokenizer", "image_tokenizer.pt"),
        ):
            shutil.copy(run / name, values(words, option)[0])
    preset = "--preset" in words or words[0] == "import-released"
    settings = [*(TINY if preset else []), *(SHORT if preset or words[0] == "train" else [])]
    return main([*words, *sets(settings)])


@pytest.mark.timeout(600)  # half a minute on an idle machine
def test_the_page_from_its_first_block_to_its_last(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left_out = []
    for language, text in blocks(PAGE.read_text()):
        if text.startswith(NOT_RUN):
            left_out.append(text.splitlines()[0].removeprefix(NOT_RUN))
        elif language == "python":
            names: dict[str, torch.Tensor] = {}
            exec(text, names)
            assert names["images"].shape == (2, 3, 32, 32)
        else:
            lines = [line for line in text.splitlines() if line.split("#")[0].strip()]
            found = list(commands(text))
            assert language == "sh" and len(found) == len(lines), text
            for words in found:
                assert run_command(words) == 0, f"{words}: {capsys.readouterr().err}"
    assert len(left_out) == 3 and all(left_out), left_out
    assert len(list(folder.glob("runs/mine/samples/0*.png"))) == 4
    assert re.search(r"^photo\.png\t.*\nother\.jpg\t", capsys.readouterr().out, re.MULTILINE)
    shards = "cogview-base-4/*/mp_rank_0[0-3]_model_states.pt"
    assert len(list(folder.glob(shards))) == 4 and Path("exported/model.safetensors").is_file()


def test_every_command_and_setting_that_is_named_exists() -> None:
    parser, config = _parser(), load_config("small")
    names = next(action.choices for action in parser._actions if action.metavar == "COMMAND")
    assert names is not None
    texts = {page.name: page.read_text() for page in PAGES}
    counted = 0
    for where, text in {**texts, "--help": DESCRIPTION}.items():
        fenced = [block for _, block in blocks(text)]
        prose = re.sub(FENCED, "", text, flags=FLAGS)
        inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
        for words in commands("\n".join([*fenced, *inline, text if where == "--help" else ""])):
            counted += 1
            try:
                assert words[0] in names, f"{where}: cogview {words[0]}"
                if any(word.startswith("--") for word in words):  # else its name alone
                    parser.parse_args(words)
                    load_config("small", values(words, "--set"))
            except SystemExit:
                pytest.fail(f"{where}: cogview {shlex.join(words)} is not understood")
        for code in inline:
            match = re.fullmatch(r"(\w+)\.(\w+)(=\S+)?", code)
            if match and hasattr(config, match[1]) and match[2] not in SUFFIXES:
                counted += 1
                assert hasattr(getattr(config, match[1]), match[2]), f"{where}: {code}"
                load_config("small", [code] if match[3] else [])
    assert counted > 60
