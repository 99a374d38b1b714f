"""Settings: dataclasses, presets in YAML (`cogview/presets/`), and `key=value` overrides.

The defaults are those of the published 4-billion-parameter model.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cogview.files import atomic_write
from cogview.sequence import Vocabulary

if TYPE_CHECKING:  # imported at run time only to read and write files: the model works without it
    from omegaconf import DictConfig

PRESETS = Path(__file__).parent / "presets"
QUANTIZERS = ("moving_average", "straight_through", "gumbel", "fixed")


@dataclass
class TextTokenizerConfig:
    vocab_size: int = 50000  # number of SentencePiece pieces
    model_type: Literal["unigram", "bpe"] = "unigram"  # SentencePiece's training algorithm
    # Share of the corpus's characters that get a piece of their own.
    character_coverage: float = 0.9995

    def __post_init__(self) -> None:
        _expect("text_tokenizer.vocab_size", self.vocab_size, self.vocab_size >= 1, "1 or more")
        share = self.character_coverage
        _expect(
            "text_tokenizer.character_coverage", share, 0 < share <= 1, "more than 0, at most 1"
        )


@dataclass
class ImageTokenizerConfig:
    """Shape and training of an image tokenizer; the defaults are CogView's.

    Attributes:
        image_size: side of the square images in pixels, a multiple of `2**num_downsamples`.
        channels: 3 for RGB, 1 for grey.
        hidden: channels of the inner convolutions.
        num_downsamples: how often the side is halved: codes form a square of side
            `image_size / 2**num_downsamples`.
        codebook_size: number of codes.
        codebook_dim: length of a code vector.
        quantizer: how the codebook is trained.
            `moving_average`: nearest code; a code follows the mean of the vectors assigned to it.
            `straight_through`: nearest code; gradients move a code towards its vectors.
            `gumbel`: codes are sampled in training, with a straight-through gradient to logits and
                codes.
            `fixed`: nearest code of a random codebook that never changes; only the encoder learns.
        decay: decay of the moving averages of code usage and, with `moving_average`, of the codes.
        commitment: weight of the loss that keeps encoder outputs near their codes.
        kl_weight: `gumbel` only: weight of KL(code distribution || uniform).
        restart_below: `moving_average` only: a code whose average usage per batch falls below this
            value restarts at a random encoder output of the batch; 0 turns this off. A code that is
            never used falls below 0.1 after 230 steps at decay 0.99, and after 22 steps at 0.9;
            below 1, at once.
        mean, std: normalisation per channel; empty: CogView's for RGB, 0.5 and 0.5 otherwise.
    """

    image_size: int = 256
    channels: int = 3
    hidden: int = 512
    num_downsamples: int = 3
    codebook_size: int = 8192
    codebook_dim: int = 256
    quantizer: str = "moving_average"
    decay: float = 0.99
    commitment: float = 0.25
    kl_weight: float = 0.0
    restart_below: float = 0.1
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        def expect(name: str, condition: bool, expected: str) -> None:
            _expect(f"image_tokenizer.{name}", getattr(self, name), condition, expected)

        for name in "image_size channels hidden num_downsamples codebook_size codebook_dim".split():
            expect(name, getattr(self, name) >= 1, "1 or more")
        factor = 2**self.num_downsamples
        multiple = f"a multiple of 2**num_downsamples = {factor}"
        expect("image_size", self.image_size % factor == 0, multiple)
        expect("quantizer", self.quantizer in QUANTIZERS, f"one of {', '.join(QUANTIZERS)}")
        expect("decay", 0 < self.decay < 1, "a number between 0 and 1")
        for name in ("commitment", "kl_weight", "restart_below"):
            expect(name, getattr(self, name) >= 0, "0 or more")
        rgb = self.channels == 3
        halves = (0.5,) * self.channels
        self.mean = tuple(self.mean) or ((0.79093, 0.76271, 0.75340) if rgb else halves)
        self.std = tuple(self.std) or ((0.30379, 0.32279, 0.32800) if rgb else halves)
        for name in ("mean", "std"):
            one_each = f"one value for each of {self.channels} channels"
            expect(name, len(getattr(self, name)) == self.channels, one_each)

    @property
    def code_size(self) -> int:
        """Side of the square of codes."""
        return self.image_size // 2**self.num_downsamples


@dataclass
class DataConfig:
    # Share of the images that neither the image tokenizer nor the GPT is trained on. Their pixels
    # and the seed decide which: all captions of an image go with it, and so do copies of it.
    # A column `held_out` of the data decides in their place where it says true or false.
    held_out_fraction: float = 0.01
    # Processes that read images and tokens ahead; -1: none on a CPU, up to 8 beside a GPU.
    workers: int = -1

    def __post_init__(self) -> None:
        fraction = self.held_out_fraction
        _expect("data.held_out_fraction", fraction, 0 < fraction < 1, "between 0 and 1")
        _expect("data.workers", self.workers, self.workers >= -1, "-1 or more")


@dataclass
class LoopConfig:
    """What the image tokenizer's training and the GPT's have in common."""

    section: ClassVar[str]
    steps: int = 100_000
    batch_size: int = 64  # examples per step
    learning_rate: float = 3e-4  # at the end of the warm-up
    final_learning_rate: float = 0.0  # at the end of the cosine
    warmup_steps: int = 0  # of the linear rise; at most a tenth of `steps`, so that it fits a trial
    clip_grad_norm: float = 1.0
    eval_every: int = 1000  # steps between measurements of the held-out loss
    eval_examples: int = 512  # largest number of examples for one measurement
    save_every: int = 1000  # steps between checkpoints
    keep_checkpoints: int = 3  # number of checkpoints to keep; older ones are deleted
    pictures_every: int = 1000  # steps between pictures; 0: none
    log_every: int = 0  # steps between lines of the log, without a terminal; 0: ten seconds
    # auto: bfloat16 where there are matrix units for it (GPUs, CPUs with AMX), float16 with loss
    # scaling on older GPUs, float32 on other CPUs. Weights, losses, codes and the transformer's
    # residual stream are float32 in any case.
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self) -> None:
        def check(names: str, condition: Callable[[float], bool], expected: str) -> None:
            for name in names.split():
                value = getattr(self, name)
                _expect(f"{self.section}.{name}", value, condition(value), expected)

        at_least_one = "steps batch_size eval_every eval_examples save_every keep_checkpoints"
        check(at_least_one, lambda value: value >= 1, "1 or more")
        positive = "learning_rate clip_grad_norm"
        check(positive, lambda value: 0 < value < math.inf, "more than 0, and finite")
        zero_or_more = "warmup_steps final_learning_rate pictures_every log_every"
        check(zero_or_more, lambda value: value >= 0, "0 or more")
        at_most = f"at most learning_rate = {self.learning_rate}"
        check("final_learning_rate", lambda value: value <= self.learning_rate, at_most)

    @property
    def warmup(self) -> int:
        """Number of steps of the warm-up: `warmup_steps`, but at most a tenth of all."""
        return min(self.warmup_steps, self.steps // 10)


@dataclass
class ImageTrainingConfig(LoopConfig):
    section: ClassVar[str] = "image_training"


@dataclass
class ModelConfig:
    num_layers: int = 48
    hidden_size: int = 2560
    num_heads: int = 40
    max_positions: int = 1089  # learned positions: the longest sequence, in tokens
    # Positions of an image that is drawn. after_text, as in CogView: they follow those of the
    # caption, so that a code has another one for each length of caption. first: an image has the
    # positions that it has where its caption is written, and so the same under every caption.
    image_positions: Literal["after_text", "first"] = "after_text"
    dropout: float = 0.1  # on the embeddings and on the output of each branch
    norm: Literal["sandwich", "pre"] = "sandwich"
    # PB-relax LayerNorm divides by the maximum of each row, or of the whole tensor (released
    # weights).
    relax: Literal["row", "tensor", "none"] = "row"
    layernorm_eps: float = 1e-5
    init_std: float = 0.02  # standard deviation of the initial weights
    # Initial weight of the norms after the branches. In a small model, a value below 1 keeps the
    # branches from drowning out the embeddings.
    sandwich_init: float = 1.0
    attention: Literal["three_region", "dense"] = "three_region"
    query_window: int = 128  # block size of the local window, in tokens
    key_window_times: int = 6  # blocks in the window, including the query's own
    num_pivots: int = 768  # random image positions that every query sees, per layer and step
    # "cogview" adds log(S // num_pivots) to the logits of pivots and text in training, and counts
    # the text among the `num_pivots`.
    pivot_bias: Literal["none", "cogview"] = "none"
    embedding_gradient_scale: float = 0.1  # factor on the embedding's gradient; 1 turns it off
    # Recompute each layer in the backward pass: less memory, more time.
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "max_positions",
            "query_window",
            "key_window_times",
        ):
            _expect(f"model.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("init_std", "sandwich_init", "layernorm_eps"):
            _expect(f"model.{name}", getattr(self, name), getattr(self, name) > 0, "more than 0")
        divides = self.hidden_size % self.num_heads == 0
        _expect(
            "model.hidden_size",
            self.hidden_size,
            divides,
            f"a multiple of num_heads = {self.num_heads}",
        )
        _expect("model.num_pivots", self.num_pivots, self.num_pivots >= 0, "0 or more")
        biased = self.pivot_bias == "cogview"
        _expect(
            "model.num_pivots",
            self.num_pivots,
            not biased or self.num_pivots >= 1,
            "1 or more with pivot_bias=cogview",
        )
        _expect("model.dropout", self.dropout, 0 <= self.dropout < 1, "0 or more, and less than 1")
        scale = self.embedding_gradient_scale
        _expect("model.embedding_gradient_scale", scale, 0 <= scale <= 1, "0 to 1")


@dataclass
class TrainingConfig(LoopConfig):
    section: ClassVar[str] = "training"
    steps: int = 144_000
    batch_size: int = 6144
    final_learning_rate: float = 3e-5
    warmup_steps: int = 2880
    task: Literal["text_to_image", "captioning"] = "text_to_image"
    # Sequences per forward and backward pass; a step sums the gradients of its passes. 0: one pass.
    micro_batch_size: int = 0
    weight_decay: float = 0.04  # on matrices; not on biases, norms and embeddings
    # text_to_image only: share of the captions that are hidden from a step. The model learns to
    # draw without one, which classifier-free guidance needs.
    caption_dropout: float = 0.0
    text_weight: float = 1.0  # weight of text tokens in the loss
    image_weight: float = 1.0  # weight of image tokens in the loss
    compile: bool = False  # torch.compile the layers: minutes once, then faster steps
    # Among the processes of torchrun, each holds the whole model (ddp) or a part of it (fsdp).
    parallel: Literal["ddp", "fsdp"] = "ddp"
    async_checkpoints: bool = False  # fsdp: training goes on while a checkpoint is written

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("micro_batch_size", "weight_decay", "text_weight"):
            _expect(f"training.{name}", getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _expect("training.image_weight", self.image_weight, self.image_weight > 0, "more than 0")
        share = self.caption_dropout
        _expect("training.caption_dropout", share, 0 <= share < 1, "0 or more, and less than 1")


@dataclass
class SamplingConfig:
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = 200  # only the k likeliest tokens; 0 turns it off
    top_p: float = 1.0  # only the likeliest tokens with this total probability; 1 turns it off
    # Classifier-free guidance of images: the logits without the caption, plus this many times what
    # the caption changes. 1: none. More needs a model with training.caption_dropout.
    guidance: float = 1.0
    batch_size: int = 16  # sequences that are drawn side by side

    def __post_init__(self) -> None:
        _expect(
            "sampling.temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"
        )
        _expect("sampling.top_k", self.top_k, self.top_k >= 0, "0 or more")
        _expect("sampling.top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1")
        _expect("sampling.guidance", self.guidance, 0 <= self.guidance < math.inf, "0 or more")
        _expect("sampling.batch_size", self.batch_size, self.batch_size >= 1, "1 or more")


@dataclass
class Config:
    """All settings of one model, from its tokenizers to its sampling."""

    seed: int = 0  # for weights, data order, dropout, pivots and drawings
    device: str = "auto"  # auto: cuda if there is a GPU, else cpu
    data: DataConfig = field(default_factory=DataConfig)
    text_tokenizer: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    image_training: ImageTrainingConfig = field(default_factory=ImageTrainingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        _expect("seed", self.seed, 0 <= self.seed < 2**63, "0 or more, below 2**63")
        std = self.image_tokenizer.std
        _expect("image_tokenizer.std", std, all(0 < s < math.inf for s in std), "more than 0")
        codes = self.num_codes
        needed = f"at least {codes + 5} ({codes} image codes, 4 command tokens, and text)"
        _expect("model.max_positions", self.model.max_positions, self.max_text_len >= 1, needed)

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.image_tokenizer.codebook_size, self.text_tokenizer.vocab_size)

    @property
    def num_codes(self) -> int:
        """Number of codes of one image."""
        return self.image_tokenizer.code_size**2

    @property
    def max_text_len(self) -> int:
        """Number of text pieces that fit beside an image and its command tokens.

        Longer captions are truncated.
        """
        return self.model.max_positions - self.num_codes - 4


def _expect(name: str, value: Any, condition: bool, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {value}")


def preset_names() -> list[str]:
    """Names of the presets, the smallest model first."""
    return sorted(
        (path.stem for path in PRESETS.glob("*.yaml")),
        key=lambda name: load_config(name).model.hidden_size,
    )


def load_config(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Reads a preset or a YAML file, and applies overrides.

    Args:
        source: name of a preset (`digits`, ..., `cogview-4b`) or path of a YAML file; settings
            that it leaves out keep the defaults of the dataclasses.
        overrides: such as `["training.steps=500", "model.attention=dense"]`.

    Raises:
        FileNotFoundError: neither a preset nor a file.
        ValueError: not YAML, an unknown key, a wrong type, or a value out of range; the message
            names the key.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = PRESETS / f"{source}.yaml"
    if not path.is_file():
        path = Path(source)
    if not path.is_file():
        names = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        raise FileNotFoundError(f"config: {str(source)!r} is neither a preset ({names}) nor a file")
    changes = OmegaConf.create()
    sections = {
        section.name: section.default_factory
        for section in dataclasses.fields(Config)
        if section.default_factory is not dataclasses.MISSING
    }
    for override in overrides:
        if not re.match(r"\w[\w.]*=", override):
            raise ValueError(f"--set: expected key=value, got {override!r}")
        if override.partition("=")[0] in sections:
            raise ValueError(f"--set: expected a key such as training.steps, got {override!r}")
        try:
            changes.merge_with_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--set: cannot read {override!r}: {reason}") from None
    config = OmegaConf.structured(Config)
    for name, section in sections.items():
        # From the class, not from an instance: __post_init__ must see only the final values.
        config[name] = OmegaConf.structured(section)
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    config = _merge(config, loaded, str(path))
    config = _merge(config, changes, "--set")
    try:
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # an interpolation of an unknown key
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    assert isinstance(result, Config)
    return result


def _merge(config: DictConfig, other: Any, where: str) -> DictConfig:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    if not isinstance(other, DictConfig):
        raise ValueError(f"{where}: expected a mapping of settings, got a list or a scalar")
    try:
        merged = OmegaConf.merge(config, other)
    except ConfigKeyError as error:
        parent, _, key = str(error.full_key).rpartition(".")
        known = OmegaConf.select(config, parent) if parent else config
        meant = _alike(str(error.full_key))
        raise ValueError(
            f"{where}: unknown key {key!r} in {parent or 'the settings'}; "
            + (f"did you mean {' or '.join(meant)}?" if meant else f"known: {', '.join(known)}")
        ) from None
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"{where}: {key}{str(error).splitlines()[0]}") from None
    assert isinstance(merged, DictConfig)
    return merged


def _alike(name: str) -> list[str]:
    """Settings that an unknown name may stand for: of the same name in another section, or else
    spelled nearly so."""
    names = []
    for section in dataclasses.fields(Config):
        names.append(section.name)
        if isinstance(section.default_factory, type):
            inner = dataclasses.fields(section.default_factory)
            names += [f"{section.name}.{setting.name}" for setting in inner]
    last = name.rpartition(".")[2]
    same = [known for known in names if known.rpartition(".")[2] == last]
    near = [known for known in names if ("." in known) == ("." in name)]
    return same or difflib.get_close_matches(name, near, n=1, cutoff=0.8)


def to_yaml(config: Config) -> str:
    """All settings as YAML that `load_config` reads."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes all settings as YAML."""
    with atomic_write(path) as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")
