import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import cogview.model
import cogview_kernels as ck
from cogview.config import ModelConfig, load_config
from cogview.model import GPT, KVCache, Operators, causal_attention

VOCAB = 96
TINY = ModelConfig(
    num_layers=3,
    hidden_size=32,
    num_heads=4,
    max_positions=80,
    dropout=0.0,
    query_window=8,
    key_window_times=2,
    num_pivots=6,
)


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(dataclasses.replace(TINY, **changes), VOCAB)


def inputs(batch=2, length=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (batch, length), generator=generator)
    positions = torch.arange(length).expand(batch, -1)
    text_len = torch.tensor([7, 11, 3][:batch], dtype=torch.int32)
    return tokens, positions, text_len


def test_parameters_of_cogview_4b():
    config = load_config("cogview-4b")
    with torch.device("meta"):
        model = GPT(config.model, config.vocabulary.padded_size)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_928_849_920
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    assert shapes["word_embeddings.weight"] == (58240, 2560)
    assert shapes["transformer.position_embeddings.weight"] == (1089, 2560)
    assert shapes["transformer.layers.47.attention.query_key_value.weight"] == (7680, 2560)
    norms = ("input_layernorm", "post_attention_layernorm", "third_layernorm", "fourth_layernorm")
    linears = (
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    )
    layer = {
        f"transformer.layers.0.{part}.{kind}"
        for part in norms + linears
        for kind in ("weight", "bias")
    }
    final = {"transformer.final_layernorm.weight", "transformer.final_layernorm.bias"}
    first = {
        name
        for name in shapes
        if not name.startswith("transformer.layers.") or ".layers.0." in name
    }
    assert first == layer | final | {
        "word_embeddings.weight",
        "transformer.position_embeddings.weight",
    }


def test_initialisation():
    model = make(hidden_size=256, num_layers=8)
    layer = model.transformer.layers[5]
    assert layer.attention.query_key_value.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert layer.attention.dense.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert layer.mlp.dense_4h_to_h.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert layer.mlp.dense_h_to_4h.bias.abs().max() == 0


@pytest.mark.parametrize("attention", ["three_region", "dense"])
@pytest.mark.parametrize("chunks", [[1] * 64, [13, 1, 1, 20, 29]])
def test_decoding_with_a_cache_equals_the_full_forward(attention, chunks):
    model = make(attention=attention).double().eval()
    tokens, positions, text_len = inputs()
    layouts = model.sample_layouts(text_len, 64, torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model.logits(model(tokens, positions, layouts))
        cache = KVCache(model.config, 2, 64, torch.float64)
        parts = []
        for t, p in zip(tokens.split(chunks, 1), positions.split(chunks, 1), strict=True):
            parts.append(model.logits(model(t, p, layouts, cache)))
    assert cache.filled == 64
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="cache: expected at most 64 tokens, got 65"):
        model(tokens[:, :1], positions[:, :1], layouts, cache)


@pytest.mark.parametrize("attention", ["three_region", "dense"])
def test_a_later_token_does_not_change_earlier_ones(attention):
    model = make(attention=attention).eval()
    tokens, positions, text_len = inputs()
    layouts = model.sample_layouts(text_len, 64, torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % VOCAB
    before, after = model(tokens, positions, layouts), model(changed, positions, layouts)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40], after[:, 40])


def test_a_window_over_everything_is_dense_attention():
    sparse, dense = make(query_window=64).eval(), make(attention="dense").eval()
    tokens, positions, text_len = inputs()
    ours = sparse(tokens, positions, sparse.sample_layouts(text_len, 64))
    theirs = dense(tokens, positions, dense.sample_layouts(text_len, 64))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_far_image_tokens_are_not_attended_to_unless_they_are_pivots():
    model = make(num_pivots=0, num_layers=1).eval()
    tokens, positions, text_len = inputs(batch=1)
    layouts = model.sample_layouts(text_len, 64)
    # The last token sees the text and its window, and no image token in between.
    for position, visible in ((3, True), (20, False), (50, True)):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        same = torch.equal(
            model(tokens, positions, layouts)[:, -1], model(changed, positions, layouts)[:, -1]
        )
        assert same != visible


def test_pivots_differ_between_layers_and_draws_and_follow_the_generator():
    model = make()
    _, _, text_len = inputs()
    one = [
        layout.pivot_idx
        for layout in model.sample_layouts(text_len, 64, torch.Generator().manual_seed(1))
    ]
    again = [
        layout.pivot_idx
        for layout in model.sample_layouts(text_len, 64, torch.Generator().manual_seed(1))
    ]
    other = [
        layout.pivot_idx
        for layout in model.sample_layouts(text_len, 64, torch.Generator().manual_seed(2))
    ]
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], other[0])
    assert (one[0] >= text_len[:, None]).all()


def test_pivot_bias_of_cogview_is_for_training_only():
    model = make(pivot_bias="cogview")
    _, _, text_len = inputs()
    bias = model.train().sample_layouts(text_len, 64)[0].pivot_bias
    assert bias == pytest.approx(math.log(64 // 6))
    assert model.eval().sample_layouts(text_len, 64)[0].pivot_bias == 0


@pytest.mark.parametrize(
    "changes", [{}, {"norm": "pre"}, {"relax": "tensor"}, {"relax": "none"}, {"attention": "dense"}]
)
def test_every_parameter_learns(changes):
    model = make(**changes)
    tokens, positions, text_len = inputs()
    z = model(tokens, positions, model.sample_layouts(text_len, 64))
    model.logits(z).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert ("third_layernorm" in str(model)) == ("norm" not in changes)


def test_the_embedding_gradient_is_shrunk():
    tokens, positions, text_len = inputs()
    grads = []
    for scale in (1.0, 0.1):
        model = make(embedding_gradient_scale=scale, num_pivots=0)
        z = model(tokens, positions, model.sample_layouts(text_len, 64))
        z.sum(-1).square().sum().backward()
        grads.append(model.transformer.position_embeddings.weight.grad)
    torch.testing.assert_close(grads[1], 0.1 * grads[0], rtol=1e-3, atol=1e-7)


def test_activation_checkpointing_changes_nothing():
    tokens, positions, text_len = inputs()
    grads = []
    for checkpointing in (False, True):
        model = make(activation_checkpointing=checkpointing, dropout=0.1)
        layouts = model.sample_layouts(text_len, 64, torch.Generator().manual_seed(1))
        torch.manual_seed(2)
        model.logits(model(tokens, positions, layouts)).logsumexp(-1).sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_text_counts_among_the_pivots_of_cogview():
    text_len = torch.tensor([2, 5, 9], dtype=torch.int32)
    for train in (True, False):
        model = make(pivot_bias="cogview").train(train)
        model_layout = model.sample_layouts(text_len, 64)[0]
        pivots = model_layout.pivot_idx
        counted = ((pivots >= text_len[:, None]) & (pivots < 64)).sum(1)
        assert counted.tolist() == [4, 1, 0]  # of num_pivots = 6
        model_layout.validate(64)


@pytest.mark.parametrize(
    ("changes", "called"),
    [
        ({}, {"three_region_attention": 3, "layer_norm": 1, "sandwich_residual": 6}),
        ({"attention": "dense", "norm": "pre"}, {"causal_attention": 3, "layer_norm": 7}),
    ],
)
def test_other_operators_take_the_place_of_the_fused_ones(changes, called):
    """Each is called as often as the model needs it, and nothing else computes; weights stay."""
    calls = dict.fromkeys(called, 0)

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs, backend="reference")

        return call

    def zeros(q, k, v):
        calls["causal_attention"] += 1
        return torch.zeros_like(q)

    operators = Operators(
        three_region_attention=counted("three_region_attention", ck.three_region_attention),
        causal_attention=zeros,
        layer_norm=counted("layer_norm", ck.pb_relax_layer_norm),
        sandwich_residual=counted("sandwich_residual", ck.sandwich_residual),
    )
    usual = make(**changes)
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, **changes), VOCAB, operators)
    for (name, weight), (other_name, other) in zip(
        usual.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(weight, other)
    tokens, positions, text_len = inputs()
    layouts = usual.sample_layouts(text_len, tokens.shape[1], torch.Generator().manual_seed(0))
    z, expected = (one(tokens, positions, layouts) for one in (model, usual))
    assert calls == called
    same = torch.allclose(z, expected, rtol=1e-4, atol=1e-5)
    assert same == ("causal_attention" not in called), "zeros are not attention"


def test_causal_attention_of_the_last_queries():
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    torch.testing.assert_close(
        causal_attention(q[:, :, 6:], k, v), causal_attention(q, k, v)[:, :, 6:]
    )


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_losses_in_parts_are_those_of_whole_logits(monkeypatch, precision):
    """Loss and gradients with weights for each target, and no tensor of whole logits."""
    model = make(num_layers=1).to(torch.float64 if precision == "float64" else torch.float32)
    half = precision == "bfloat16"
    torch.manual_seed(1)
    z = torch.randn(3, 50, TINY.hidden_size, dtype=model.word_embeddings.weight.dtype)
    z.requires_grad_()
    targets = torch.randint(VOCAB, (3, 50))
    weights = torch.randint(0, 3, (3, 50)) / 2

    def run(function):
        z.grad = model.word_embeddings.weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            losses = function()
        (losses * weights).sum().backward()
        return losses, z.grad, model.word_embeddings.weight.grad

    def whole():
        logits = model.logits(z)
        logits = logits.float() if half else logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(
            3, 50
        )

    expected = run(whole)
    sizes = []
    cross_entropy = cogview.model._cross_entropy
    monkeypatch.setattr(cogview.model, "WHOLE_LOGITS", 0)
    monkeypatch.setattr(cogview.model, "PART_OF_LOGITS", 4 * VOCAB * 12)
    monkeypatch.setattr(
        cogview.model,
        "_cross_entropy",
        lambda z, *others: sizes.append(len(z)) or cross_entropy(z, *others),
    )
    actual = run(lambda: model.losses(z, targets))
    assert max(sizes) <= 12 and sum(sizes) == 2 * 150  # forward, and again in the backward pass
    assert actual[0].dtype == expected[0].dtype
    # Sums over parts: of the gradient of the embedding, in bfloat16 under autocast.
    bound = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 2e-2}[precision]
    assert torch.equal(actual[0], expected[0]) or precision != "bfloat16"
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).norm() <= bound * theirs.norm()


def test_the_losses_of_a_4b_vocabulary_need_a_seventh_of_the_memory(monkeypatch):
    """One sequence of 1088 targets under bfloat16: bytes of torch's allocator at the peak."""
    torch.manual_seed(0)
    hidden, vocabulary = 16, 58240
    model = GPT(dataclasses.replace(TINY, num_layers=1, hidden_size=hidden), vocabulary)
    targets = torch.randint(vocabulary, (1, 1088))

    def peak():
        z = torch.randn(1, 1088, hidden, requires_grad=True)
        with torch.profiler.profile(profile_memory=True) as profile:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses = model.losses(z, targets)
            losses.sum().backward()
        live = torch.tensor(
            [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        ).cumsum(0)
        return int(live.max()) / 1e6

    parts = peak()
    monkeypatch.setattr(cogview.model, "WHOLE_LOGITS", 2**40)
    whole = peak()
    assert whole > 600  # three tensors of float32, or one and two of bfloat16
    assert 7 * parts < whole


def test_the_largest_hidden_value_of_each_layer(monkeypatch):
    model = make()
    tokens, positions, text_len = inputs()
    seen = []
    for layer in model.transformer.layers:
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0].abs().max()))
    model(tokens, positions, model.sample_layouts(text_len, 64))
    assert torch.equal(model.max_hidden, torch.stack(seen)) and len(seen) == TINY.num_layers
    assert model.max_hidden.min() > 1
