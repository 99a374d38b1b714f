from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cogview.config import QUANTIZERS, ImageTokenizerConfig, load_config
from cogview.demo.digits import make_scenes
from cogview.image_tokenizer import ImageTokenizer, Quantizer
from cogview.image_training import ImageTokenizerTrainer
from cogview.loop import read_metrics

TINY = ImageTokenizerConfig(
    image_size=32,
    channels=1,
    hidden=16,
    num_downsamples=2,
    codebook_size=32,
    codebook_dim=8,
    decay=0.9,
)


def trained(
    folder: Path,
    images: torch.Tensor,
    tokenizer: ImageTokenizerConfig = TINY,
    seed: int = 0,
    **settings: float,
) -> ImageTokenizer:
    config = replace(load_config("digits", ["device=cpu"]), seed=seed, image_tokenizer=tokenizer)
    settings |= {"pictures_every": 0}
    config = replace(config, image_training=replace(config.image_training, **settings))
    trainer = ImageTokenizerTrainer(config, folder, images, images[:8], progress=False)
    trainer.run()
    return trainer.model


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    """(256, 1, 32, 32): single handwritten digits."""
    return make_scenes("train", 256, seed=0).images[:, :, :32, :32].contiguous()


@pytest.fixture
def tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(TINY).eval()


def test_the_defaults_are_cogviews_tokenizer() -> None:
    tokenizer = ImageTokenizer(ImageTokenizerConfig())
    assert sum(p.numel() for p in tokenizer.parameters()) == 19_034_883
    shapes = {name: tuple(value.shape) for name, value in tokenizer.state_dict().items()}
    assert shapes == {
        "enc_b.blocks.0.weight": (512, 3, 4, 4),
        "enc_b.blocks.0.bias": (512,),
        "enc_b.blocks.2.weight": (512, 512, 4, 4),
        "enc_b.blocks.2.bias": (512,),
        "enc_b.blocks.4.weight": (512, 512, 4, 4),
        "enc_b.blocks.4.bias": (512,),
        "enc_b.blocks.6.weight": (256, 512, 1, 1),
        "enc_b.blocks.6.bias": (256,),
        "quantize_t.embed": (256, 8192),
        "quantize_t.cluster_size": (8192,),
        "quantize_t.embed_avg": (256, 8192),
        "dec.blocks.0.weight": (256, 512, 4, 4),
        "dec.blocks.0.bias": (512,),
        "dec.blocks.2.weight": (512, 512, 4, 4),
        "dec.blocks.2.bias": (512,),
        "dec.blocks.4.weight": (512, 512, 4, 4),
        "dec.blocks.4.bias": (512,),
        "dec.blocks.6.weight": (3, 512, 1, 1),
        "dec.blocks.6.bias": (3,),
    }
    assert (tokenizer.quantize_t.cluster_size == 1).all()
    assert tokenizer.config.code_size == 32


def test_encode_and_decode(tokenizer: ImageTokenizer, digits: torch.Tensor) -> None:
    codes = tokenizer.encode(digits[:10])
    assert codes.shape == (10, 8, 8) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < 32
    images = tokenizer.decode(codes)
    assert images.shape == (10, 1, 32, 32) and 0 <= images.min() and images.max() <= 1
    assert torch.equal(tokenizer.decode(codes.to(torch.int16)), images)


def test_the_codes_are_the_nearest_ones(tokenizer: ImageTokenizer, digits: torch.Tensor) -> None:
    images = digits[:4]
    vectors = tokenizer.enc_b((images - 0.5) / 0.5).permute(0, 2, 3, 1).reshape(-1, 8).double()
    distances = torch.cdist(vectors, tokenizer.quantize_t.embed.t().double())
    codes = tokenizer.encode(images).flatten()
    chosen = distances.gather(1, codes[:, None]).squeeze(1)
    assert (chosen <= distances.amin(1) + 1e-6).all()


def test_chunks_do_not_change_the_result(tokenizer: ImageTokenizer, digits: torch.Tensor) -> None:
    codes = tokenizer.encode(digits[:10])
    assert torch.equal(tokenizer.encode(digits[:10], batch_size=3), codes)
    assert tokenizer.encode(digits[:0]).shape == (0, 8, 8)
    torch.testing.assert_close(tokenizer.decode(codes, batch_size=3), tokenizer.decode(codes))


def test_encoding_never_changes_the_tokenizer(digits: torch.Tensor) -> None:
    tokenizer = ImageTokenizer(TINY).train()
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    tokenizer.decode(tokenizer.encode(digits[:8]))
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())


def test_uint8_images_are_scaled(tokenizer: ImageTokenizer, digits: torch.Tensor) -> None:
    pixels = (digits[:4] * 255).round().to(torch.uint8)
    assert torch.equal(tokenizer.encode(pixels), tokenizer.encode(pixels.float() / 255))


@pytest.mark.parametrize("quantizer", ["moving_average", "straight_through", "fixed"])
def test_the_gradient_passes_straight_through(quantizer: str) -> None:
    module = Quantizer(replace(TINY, quantizer=quantizer, commitment=0.0)).train()
    vectors = torch.randn(20, 8, requires_grad=True)
    dout = torch.randn(20, 8)
    quantised, codes, _ = module(vectors)
    assert not torch.equal(quantised, vectors)
    (dvectors,) = torch.autograd.grad(quantised, vectors, dout)
    assert torch.equal(dvectors, dout)
    assert codes.shape == (20,)


def test_a_step_that_float16_skips_leaves_the_codebook_alone() -> None:
    module = Quantizer(TINY).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    vectors = torch.randn(20, 8)
    vectors[3, 2] = torch.inf
    module(vectors)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_gumbel_trains_logits_and_codes() -> None:
    torch.manual_seed(0)
    module = Quantizer(replace(TINY, quantizer="gumbel", kl_weight=0.1)).train()
    vectors = torch.randn(20, 8, requires_grad=True)
    quantised, codes, loss = module(vectors)
    torch.testing.assert_close(quantised, module.lookup(codes))
    assert loss > 0  # a KL divergence from the uniform distribution
    dvectors, dembed = torch.autograd.grad(quantised.square().sum(), (vectors, module.embed))
    assert dvectors.abs().sum(1).min() > 0 and dembed.abs().sum() > 0
    assert torch.equal(module.eval()(vectors)[1], module.nearest(vectors))


def test_moving_average_follows_its_definition() -> None:
    torch.manual_seed(0)
    config = replace(TINY, codebook_size=5, codebook_dim=3, restart_below=0.0)
    module = Quantizer(config).train()
    size, total = torch.ones(5), module.embed.clone().t()
    for _ in range(30):
        vectors = torch.randn(16, 3)
        vectors[:, 0] = vectors[:, 0].abs() + 1  # some codes are never used
        codes = module(vectors)[1]
        for k in range(5):
            assigned = vectors[codes == k]
            size[k] = 0.9 * size[k] + 0.1 * len(assigned)
            total[k] = 0.9 * total[k] + 0.1 * assigned.sum(0)
    torch.testing.assert_close(module.cluster_size, size)
    torch.testing.assert_close(module.embed, (total / size[:, None]).t())


def test_an_unused_code_stays_where_it_is_without_restarts() -> None:
    module = Quantizer(replace(TINY, restart_below=0.0, decay=0.5)).train()
    module.embed[:, 7] = 100.0
    module.embed_avg[:, 7] = 100.0
    for _ in range(300):
        module(torch.randn(16, 8))
    assert module.embed.isfinite().all()
    torch.testing.assert_close(module.embed[:, 7], torch.full((8,), 100.0))


def test_an_unused_code_restarts_at_an_encoder_output() -> None:
    module = Quantizer(TINY).train()
    module.embed[:, 7] = 100.0
    module.embed_avg[:, 7] = 100.0
    for step in range(22):  # 0.9 ** 22 < 0.1
        vectors = torch.randn(64, 8)
        module(vectors)
        assert bool(module.embed[0, 7] > 99) == (step < 21)
    assert (vectors == module.embed[:, 7]).all(1).any()
    assert module.cluster_size[7] == 1


def test_a_fixed_codebook_is_fixed(digits: torch.Tensor, tmp_path: Path) -> None:
    config = replace(TINY, quantizer="fixed")
    few = trained(tmp_path / "few", digits, config, steps=1)
    more = trained(tmp_path / "more", digits, config, steps=5)
    assert torch.equal(few.quantize_t.embed, more.quantize_t.embed)


@pytest.mark.parametrize(
    ("quantizer", "precision"),
    [*((rule, "float32") for rule in QUANTIZERS), ("moving_average", "bfloat16")],
)
def test_every_rule_learns_to_reconstruct(
    quantizer: str, precision: str, digits: torch.Tensor, tmp_path: Path
) -> None:
    config = replace(TINY, quantizer=quantizer)
    settings: Any = {"steps": 120, "learning_rate": 4e-3, "precision": precision}
    tokenizer = trained(tmp_path, digits, config, **settings)
    error = F.mse_loss(tokenizer.decode(tokenizer.encode(digits)), digits)
    assert error < 0.4 * digits.var(), f"{error} of a variance of {digits.var()}"


def test_training_is_deterministic_and_leaves_the_random_state_alone(
    digits: torch.Tensor, tmp_path: Path
) -> None:
    def train(name: str, seed: int) -> dict[str, torch.Tensor]:
        torch.randn(seed)
        state = torch.get_rng_state()
        tokenizer = trained(tmp_path / name, digits, seed=seed, steps=25, batch_size=8)
        assert torch.equal(torch.get_rng_state(), state)
        return tokenizer.state_dict()

    first, again, other = train("first", 1), train("again", 1), train("other", 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["enc_b.blocks.0.weight"], other["enc_b.blocks.0.weight"])


def test_training_metrics(digits: torch.Tensor, tmp_path: Path) -> None:
    trained(tmp_path, digits, steps=3, batch_size=8, eval_every=3)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in metrics] == [1, 2, 3]
    for record in metrics:
        assert record["loss"] == pytest.approx(
            record["reconstruction_loss"] + record["codebook_loss"]
        )
        assert 1 <= record["perplexity"] <= record["codes_used"] <= 32
    assert metrics[-1]["held_out_reconstruction_loss"] > 0
    assert [("held_out_codes_used" in record) for record in metrics] == [False, False, True]


def test_wrong_images(tokenizer: ImageTokenizer, digits: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 1, 32, 32\), got \(2, 1, 16, 16\)"):
        tokenizer.encode(digits[:2, :, :16, :16])
    with pytest.raises(TypeError, match=r"expected floating point or uint8, got torch.int64"):
        tokenizer.encode(digits[:2].long())
    for value in (torch.nan, torch.inf):
        broken = digits[:4].clone()
        broken[2, 0, 5, 5] = value
        with pytest.raises(ValueError, match="image 2 of the batch holds NaN or infinity"):
            tokenizer.encode(broken)
        with pytest.raises(ValueError, match="NaN or infinity"):
            trained(tmp_path, broken, steps=2, batch_size=4)
    with pytest.raises(ValueError, match="at least one image"):
        trained(tmp_path, digits[:0], steps=1)


def test_wrong_codes(tokenizer: ImageTokenizer) -> None:
    with pytest.raises(ValueError, match=r"codes: expected \(B, 8, 8\), got \(1, 64\)"):
        tokenizer.decode(torch.zeros(1, 64, dtype=torch.int64))
    for wrong in (-1, 32):
        with pytest.raises(ValueError, match="codes: expected 0 to 31"):
            tokenizer.decode(torch.full((1, 8, 8), wrong))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 30}, "image_size: expected a multiple of"),
        ({"hidden": 0}, "hidden: expected 1 or more, got 0"),
        ({"quantizer": "k_means"}, "quantizer: expected one of moving_average"),
        ({"decay": 1.0}, "decay: expected a number between 0 and 1"),
        ({"mean": (0.5, 0.5)}, "mean: expected one value for each of 1 channels"),
    ],
)
def test_wrong_configuration(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_save_and_load(tokenizer: ImageTokenizer, digits: torch.Tensor, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a.pt")
    loaded = ImageTokenizer.load(tmp_path / "a.pt")
    assert loaded.config == tokenizer.config and not loaded.training
    assert torch.equal(loaded.encode(digits), tokenizer.encode(digits))


def test_loads_a_bare_state_dict_of_a_wrapped_model(
    tokenizer: ImageTokenizer, digits: torch.Tensor, tmp_path: Path
) -> None:
    state = {f"module.{name}": value for name, value in tokenizer.state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    loaded = ImageTokenizer.load(tmp_path / "a.pt", TINY)
    assert torch.equal(loaded.encode(digits), tokenizer.encode(digits))
    with pytest.raises(ValueError, match=r"a\.pt: expected weights of this image tokenizer"):
        ImageTokenizer.load(tmp_path / "a.pt", replace(TINY, hidden=24))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not a checkpoint",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: data[:4000] + bytes([data[4000] ^ 1]) + data[4001:],
    ],
    ids=["empty", "text", "half", "last byte", "head", "bit flip"],
)
def test_damaged_files(
    tokenizer: ImageTokenizer, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "a.pt"
    tokenizer.save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.pt: expected a saved image tokenizer"):
        ImageTokenizer.load(path)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file.*a\.pt"):
        ImageTokenizer.load(tmp_path / "a.pt")
    for other in (torch.zeros(3), {"config": {"depth": 3}, "model": {}}, {"weights": 1}):
        torch.save(other, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"a\.pt: expected weights of this image tokenizer"):
            ImageTokenizer.load(tmp_path / "a.pt")
