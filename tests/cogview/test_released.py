"""The released layout, against the original layer as its code states it: with tensor parallelism,
and with nothing from cogview/model.py."""

import argparse
import math
import random
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cogview.cli import main
from cogview.config import load_config
from cogview.image_tokenizer import ImageTokenizer
from cogview.model import GPT
from cogview.released import read_released
from cogview.run import Run
from cogview.text_tokenizer import TextTokenizer
from cogview.weights import load_weights_file

HIDDEN, HEADS, LAYERS, POSITIONS, SIZE = 32, 4, 2, 40, 16 + 20 + 27
SETTINGS = [
    "device=cpu",
    "text_tokenizer.vocab_size=20",
    "image_tokenizer.image_size=16",
    "image_tokenizer.num_downsamples=2",
    "image_tokenizer.codebook_size=16",
    f"model.num_heads={HEADS}",
    "model.attention=dense",
    "model.dropout=0",
    "model.activation_checkpointing=false",
]
OPTIONS = [argument for setting in SETTINGS for argument in ("--set", setting)]


def megatron_split(master, dim, rank, world_size, stride=1):
    """How Megatron's _initialize_affine_weight deals a weight out: `stride` is 3 for Q, K, V."""
    pieces = torch.split(master, master.shape[dim] // world_size // stride, dim)
    return torch.cat(pieces[rank::world_size], dim)


def synthetic(world_size, seed=0, scale=0.3):
    """The state dicts of the shards of a model with random weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, mean=0.0):
        return (torch.randn(*shape, generator=generator) * scale + mean).half()

    vocabulary = draw(128, HIDDEN)
    padded = torch.cat([vocabulary, draw(128 * (world_size - 1), HIDDEN)])
    positions = draw(POSITIONS, HIDDEN)
    shards = [{} for _ in range(world_size)]

    def put(name, master, dim=None, stride=1):
        for rank, shard in enumerate(shards):
            whole = dim is None
            part = master if whole else megatron_split(master, dim, rank, world_size, stride)
            shard[name] = part.clone()

    put("word_embeddings.weight", padded, 0)
    put("transformer.position_embeddings.weight", positions)
    norms = [f"transformer.layers.{i}.{n}_layernorm" for i in range(LAYERS)
             for n in ("input", "post_attention", "third", "fourth")]  # fmt: skip
    for name in [*norms, "transformer.final_layernorm"]:
        put(f"{name}.weight", draw(HIDDEN, mean=1.0))
        put(f"{name}.bias", draw(HIDDEN))
    for i in range(LAYERS):
        layer = f"transformer.layers.{i}"
        put(f"{layer}.attention.query_key_value.weight", draw(3 * HIDDEN, HIDDEN), 0, stride=3)
        put(f"{layer}.attention.query_key_value.bias", draw(3 * HIDDEN), 0, stride=3)
        put(f"{layer}.attention.dense.weight", draw(HIDDEN, HIDDEN), 1)
        put(f"{layer}.attention.dense.bias", draw(HIDDEN))
        put(f"{layer}.mlp.dense_h_to_4h.weight", draw(4 * HIDDEN, HIDDEN), 0)
        put(f"{layer}.mlp.dense_h_to_4h.bias", draw(4 * HIDDEN), 0)
        put(f"{layer}.mlp.dense_4h_to_h.weight", draw(HIDDEN, 4 * HIDDEN), 1)
        put(f"{layer}.mlp.dense_4h_to_h.bias", draw(HIDDEN))
    return shards


def original_logits(shards, tokens):
    """mpu/sparse_transformer.py and model/gpt2_modeling.py of the released code, dense attention,
    without dropout, in float64; the sums over shards are its all-reduces."""
    shards = [{name: tensor.double() for name, tensor in shard.items()} for shard in shards]
    rows = len(shards[0]["word_embeddings.weight"])
    length = tokens.shape[1]

    def layer_norm(x, name):
        x = x / (x.abs().max() / 8)
        weight, bias = shards[0][f"{name}.weight"], shards[0][f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    def heads(x):
        return x.view(*x.shape[:2], HEADS // len(shards), HIDDEN // HEADS).permute(0, 2, 1, 3)

    def attention(z, name):
        total = 0
        for shard in shards:
            mixed = F.linear(
                z, shard[f"{name}.query_key_value.weight"], shard[f"{name}.query_key_value.bias"]
            )
            q, k, v = (heads(x) for x in mixed.split(mixed.shape[-1] // 3, dim=-1))
            mask = torch.ones(length, length, dtype=torch.float64).tril()
            scores = torch.matmul(q / math.sqrt(q.shape[-1]), k.transpose(-1, -2))
            scores = scores * mask - 10000.0 * (1.0 - mask)
            context = torch.matmul(scores.softmax(-1), v).permute(0, 2, 1, 3).flatten(2)
            total = total + F.linear(context, shard[f"{name}.dense.weight"])
        return total + shards[0][f"{name}.dense.bias"]

    def gelu(x):
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * x * (1.0 + 0.044715 * x * x)))

    def mlp(z, name):
        total = 0
        for shard in shards:
            wide = F.linear(
                z, shard[f"{name}.dense_h_to_4h.weight"], shard[f"{name}.dense_h_to_4h.bias"]
            )
            total = total + F.linear(gelu(wide), shard[f"{name}.dense_4h_to_h.weight"])
        return total + shards[0][f"{name}.dense_4h_to_h.bias"]

    h = 0
    for rank, shard in enumerate(shards):  # VocabParallelEmbedding
        own = (tokens >= rank * rows) & (tokens < (rank + 1) * rows)
        looked_up = shard["word_embeddings.weight"][torch.where(own, tokens - rank * rows, 0)]
        h = h + looked_up * own.unsqueeze(-1)
    h = h + shards[0]["transformer.position_embeddings.weight"][torch.arange(length)]
    for i in range(LAYERS):
        layer = f"transformer.layers.{i}"
        out = attention(layer_norm(h, f"{layer}.input_layernorm"), f"{layer}.attention")
        h = h + layer_norm(out, f"{layer}.third_layernorm")
        out = mlp(layer_norm(h, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
        h = h + layer_norm(out, f"{layer}.fourth_layernorm")
    h = layer_norm(h, "transformer.final_layernorm")
    logits = [F.linear(h, shard["word_embeddings.weight"]) for shard in shards]
    return torch.cat(logits, -1)[..., :SIZE]


def write(folder, shards, tracker="latest_checkpointed_iteration.txt", **more):
    (folder / "142000").mkdir(parents=True)
    (folder / tracker).write_text("142000\n")
    for rank, shard in enumerate(shards):
        path = folder / "142000" / f"mp_rank_{rank:02d}_model_states.pt"
        torch.save({"module": shard, "iteration": 142000, **more}, path)
    return folder


def our_logits(run, tokens):
    config, weights = run.config, run.weights()
    model = GPT(config.model, config.vocabulary.padded_size).double().eval()
    model.load_state_dict(weights.tensors)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        z = model(tokens, positions, [None] * LAYERS)
        return model.logits(z)[..., :SIZE]


def cogview(*arguments):
    return main([str(argument) for argument in arguments])


TOKENS = torch.randint(SIZE, (2, POSITIONS), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_released_checkpoint_gives_the_logits_of_the_original(tmp_path, world_size, capsys):
    shards = synthetic(world_size)
    generators = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),  # noqa: NPY002
        "torch_rng_state": torch.get_rng_state(),
        "args": argparse.Namespace(seed=1),
    }
    released = write(tmp_path / "released", shards, **generators)
    assert cogview("import-released", released, "--run", tmp_path / "run", *OPTIONS) == 0
    assert "put text_tokenizer.model and image_tokenizer.pt there" in capsys.readouterr().out
    run = Run.open(tmp_path / "run")
    model = run.config.model
    assert (model.relax, model.norm, model.max_positions) == ("tensor", "sandwich", POSITIONS)
    assert len(run.weights().tensors["word_embeddings.weight"]) == run.config.vocabulary.padded_size
    expected = original_logits(shards, TOKENS)
    assert expected.std() > 0.3
    torch.testing.assert_close(our_logits(run, TOKENS), expected, rtol=1e-9, atol=1e-9)

    # And out again, for another number of processes.
    for count in (1, 2, 4):
        out = tmp_path / f"out{count}"
        options = ("--out", out, "--released", "--shards", count)
        assert cogview("export", "--run", run.path, *options) == 0
        states = [
            torch.load(path, weights_only=True)["module"]
            for path in sorted(out.glob("*/mp_rank_*_model_states.pt"))
        ]
        assert len(states) == count
        torch.testing.assert_close(
            original_logits(states, TOKENS), expected, rtol=1e-12, atol=1e-12
        )
        if count == world_size == 1:
            assert states[0].keys() == shards[0].keys()
            assert all(torch.equal(states[0][name], shards[0][name]) for name in shards[0])
    assert len(states[0]["word_embeddings.weight"]) == 128  # a multiple of 128 for each of 4 shards


def test_the_settings_of_the_release_are_those_of_the_published_model(tmp_path):
    """Sizes come from the tensors; a release has them all, so that no --set is needed."""
    from cogview.released import released_config

    with torch.device("meta"):
        config = load_config("cogview-4b")
        model = GPT(config.model, config.vocabulary.padded_size)
    ours = released_config(dict(model.state_dict()), 1)
    assert (ours.model.num_layers, ours.model.hidden_size, ours.model.num_heads) == (48, 2560, 40)
    assert (ours.model.relax, ours.model.pivot_bias, ours.model.num_pivots) == (
        "tensor",
        "cogview",
        768,
    )


def error(capsys, *arguments):
    assert cogview(*arguments) == 2
    return capsys.readouterr().err


def test_what_is_wrong_with_a_released_checkpoint_is_named(tmp_path, capsys):
    def complaint(folder, *options):
        run = tmp_path / "run"
        text = error(capsys, "import-released", folder, "--run", run, *OPTIONS, *options)
        assert not (run / "config.yaml").exists()
        return text

    (tmp_path / "empty").mkdir()
    assert "expected mp_rank_00_model_states.pt in it" in complaint(tmp_path / "empty")

    shards = synthetic(2)
    missing = write(tmp_path / "missing", shards, "latest")
    (missing / "142000" / "mp_rank_00_model_states.pt").unlink()
    assert "expected mp_rank_00_model_states.pt in it, got none" in complaint(missing)

    released = write(tmp_path / "released", shards)
    wrong = complaint(released, "--set", "text_tokenizer.vocab_size=2000")
    assert "text_tokenizer.vocab_size" in wrong and "has 256 rows in 2 shards" in wrong
    wrong = complaint(released, "--set", "model.num_layers=3")
    assert "missing transformer.layers.2" in wrong

    path = released / "142000" / "mp_rank_01_model_states.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "mp_rank_01_model_states.pt: truncated or damaged" in complaint(released)
    torch.save({"model": shards[1]}, path)
    assert "under the key 'module'" in complaint(released)
    torch.save({"module": shards[1], "hook": Evil()}, path)
    assert "could run code" in complaint(released)
    torch.save({"module": {**shards[1], "transformer.final_layernorm.bias": torch.ones(32)}}, path)
    assert "transformer.final_layernorm.bias: expected the same in all shards" in complaint(
        released
    )
    torch.save({"module": {"weight": torch.ones(1)}}, path)
    assert "expected the names of mp_rank_00" in complaint(released)


def test_the_tokenizers_of_an_import_are_recorded(tmp_path, capsys):
    """Those that are named and those that lie in the folder; others that come later are an error,
    and what cannot be checked is said."""
    released = write(tmp_path / "released", synthetic(1))
    small = ("--set", "image_tokenizer.hidden=8", "--set", "image_tokenizer.codebook_dim=4")
    corpus = [f"a {colour} wall" for colour in ("red", "green", "blue", "black", "yellow")] * 3
    text, other = tmp_path / "text.model", tmp_path / "other.model"
    TextTokenizer.train(corpus, text, 20)
    TextTokenizer.train(corpus, other, 20, model_type="bpe")
    known, unknown = tmp_path / "known", tmp_path / "unknown"
    known.mkdir()
    config = load_config("cogview-4b", [*SETTINGS, *small[1::2]])
    ImageTokenizer(config.image_tokenizer).save(known / "image_tokenizer.pt")
    image = shutil.copy(known / "image_tokenizer.pt", tmp_path / "image.pt")

    named = ("--text-tokenizer", text)
    assert cogview("import-released", released, "--run", known, *OPTIONS, *small, *named) == 0
    assert cogview("import-released", released, "--run", unknown, *OPTIONS, *small) == 0
    shutil.copy(text, unknown / "text_tokenizer.model")
    shutil.copy(image, unknown / "image_tokenizer.pt")
    for run, warnings in ((known, 0), (unknown, 1)):
        capsys.readouterr()
        assert cogview("sample", "--run", run, "a red wall", "--quiet") == 0
        said = capsys.readouterr().err
        assert said.count("does not say which") == warnings
        assert said.count("which text tokenizer and image tokenizer it") == warnings
    for path, name in ((other, "text_tokenizer.model"), (image, "image_tokenizer.pt")):
        if path is image:
            ImageTokenizer(config.image_tokenizer).save(image)  # other random weights
        right = (known / name).read_bytes()
        shutil.copy(path, known / name)
        what = name.partition(".")[0].replace("_", " ")
        assert f"trained with another {what}" in error(capsys, "sample", "--run", known, "a wall")
        (known / name).write_bytes(right)


class Evil:
    def __reduce__(self):
        return print, ("ran code",)


def test_what_cannot_be_exported_is_named(tmp_path, capsys):
    released = write(tmp_path / "released", synthetic(1))
    run = tmp_path / "run"
    assert cogview("import-released", released, "--run", run, *OPTIONS) == 0
    out = ("--out", tmp_path / "out")
    wrong = error(capsys, "export", "--run", run, *out, "--released", "--shards", 3)
    assert "--shards: expected a number that divides 4 heads, got 3" in wrong
    assert "--shards: expected --released" in error(
        capsys, "export", "--run", run, *out, "--shards", 2
    )
    assert "expected a new folder" in error(capsys, "import-released", released, "--run", run)
    tensors = dict(load_weights_file(run / "model.safetensors").tensors)
    merged, count = read_released(released)
    assert count == 1 and torch.equal(merged["transformer.final_layernorm.bias"].float(),
                                      tensors["transformer.final_layernorm.bias"])  # fmt: skip
