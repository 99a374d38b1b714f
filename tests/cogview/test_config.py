import dataclasses
import re
import subprocess
import sys

import pytest

from cogview.config import Config, load_config, preset_names, save_config


def test_every_preset_loads_and_the_smallest_comes_first():
    names = preset_names()
    assert names[0] == "digits" and names[-1] == "cogview-4b"
    for name in names:
        assert isinstance(load_config(name), Config)


def test_cogview_4b_has_the_sizes_of_the_published_model():
    config = load_config("cogview-4b")
    assert config.vocabulary.padded_size == 58240
    assert config.num_codes == 1024
    model = config.model
    assert (model.num_layers, model.hidden_size, model.num_heads, model.max_positions) == (
        48,
        2560,
        40,
        1089,
    )


def test_large_models_recompute_their_activations():
    for name in ("medium", "cogview-4b"):
        assert load_config(name).model.activation_checkpointing


def test_three_region_attention_is_for_long_sequences():
    """Below 4096 tokens only the demonstration of it, and the published model, have it."""
    for name in set(preset_names()) - {"digits", "cogview-4b"}:
        model = load_config(name).model
        assert (model.attention == "three_region") == (model.max_positions >= 4096), name
    for name in ("digits", "cogview-4b"):
        assert load_config(name).model.attention == "three_region"


def test_overrides_win_over_the_preset():
    config = load_config(
        "digits", ["training.steps=7", "model.attention=dense", "training.learning_rate=1e-3"]
    )
    assert (config.training.steps, config.model.attention, config.training.learning_rate) == (
        7,
        "dense",
        1e-3,
    )
    assert config.model.hidden_size == load_config("digits").model.hidden_size


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.stepz=1",
            "--set: unknown key 'stepz' in training; did you mean training.steps\\?",
        ),
        ("trainin.steps=1", "unknown key 'trainin' in the settings; did you mean training\\?"),
        ("steps=1", "did you mean image_training.steps or training.steps\\?"),
        ("model.vocab_size=9", "did you mean text_tokenizer.vocab_size\\?"),
        ("training.lr=1", "unknown key 'lr' in training; known: steps, batch_size"),
        ("zzz=1", "unknown key 'zzz' in the settings; known: seed"),
        ("training.learning_rate=inf", "training.learning_rate: expected more than 0, and finite"),
        ("model.layernorm_eps=0", "model.layernorm_eps: expected more than 0, got 0.0"),
        ("training.steps=many", "training.steps.*'many'"),
        ("training.steps=0", "training.steps: expected 1 or more, got 0"),
        ("training=3", "--set: expected a key such as training.steps, got 'training=3'"),
        ("training.steps", "expected key=value, got 'training.steps'"),
        ("=3", "--set: expected key=value, got '=3'"),
        ("model.norm=post", "model.norm.*'post'"),
        ("model.num_heads=3", "model.hidden_size: expected a multiple of num_heads = 3"),
        (
            "model.max_positions=260",
            re.escape("model.max_positions: expected at least 261 (256 image codes"),
        ),
        ("sampling.top_p=0", "sampling.top_p: expected more than 0"),
        (
            "training.learning_rate=.inf",
            "training.learning_rate: expected more than 0, and finite, got inf",
        ),
        (f"seed={2**63}", r"seed: expected 0 or more, below 2\*\*63, got 9"),
        ("image_tokenizer.image_size=63", "image_size"),
        ("model.num_layers=[1", re.escape("--set: cannot read 'model.num_layers=[1': ")),
        ("model.num_layers=\x00", "--set: cannot read 'model.num_layers="),
        ("model.num_layers=${x", "model.num_layers"),
        ("model.num_layers=${nowhere}", "model.num_layers: .*'nowhere'"),
        ("image_tokenizer.std=[0.0]", "image_tokenizer.std: expected more than 0"),
        ("image_tokenizer.std=[.nan]", "image_tokenizer.std: expected more than 0"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_config("digits", [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not YAML"), ("- 1\n", "expected a mapping"), ("modle: {}\n", "unknown key 'modle'")],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load_config(path)
    assert "broken.yaml" in str(raised.value)


def test_a_missing_file_names_the_presets():
    with pytest.raises(
        FileNotFoundError, match="'digit' is neither a preset .*digits.* nor a file"
    ):
        load_config("digit")


def test_saving_and_loading_gives_the_same_settings(tmp_path):
    config = load_config("digits", ["seed=3"])
    save_config(config, tmp_path / "config.yaml")
    assert dataclasses.asdict(load_config(tmp_path / "config.yaml")) == dataclasses.asdict(config)


def test_the_model_needs_none_of_the_optional_packages():
    optional = ("matplotlib", "omegaconf", "PIL", "sentencepiece", "sklearn", "tqdm")
    script = (
        f"import sys; sys.modules |= dict.fromkeys({optional})\n"  # makes their import fail
        "from cogview.config import ModelConfig\n"
        "from cogview.model import GPT\n"
        "GPT(ModelConfig(num_layers=1, hidden_size=8, num_heads=2), vocab_size=5)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
