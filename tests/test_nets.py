"""CNN-M-2048 as the paper describes it, its response normalisation, its dropout masks."""

import numpy as np
import pytest
import torch
from torch import nn

from nets.cnn_m import CNNM, LocalResponseNorm
from nets.dropout import draw_dropout_masks

#: Fig. 1 and sec. 5: layer -> output shape (channels, side, side) at 224 px, or units.
LAYER_TABLE = {
    "features.conv1": (96, 109, 109),
    "features.pool1": (96, 54, 54),
    "features.conv2": (256, 26, 26),
    "features.pool2": (256, 13, 13),
    "features.conv3": (512, 13, 13),
    "features.conv4": (512, 13, 13),
    "features.conv5": (512, 13, 13),
    "features.pool5": (512, 6, 6),
    "full6": (4096,),
    "full7": (2048,),
    "scores": (101,),
}
#: kernel, stride, padding
CONVOLUTIONS = {"conv1": (7, 2, 0), "conv2": (5, 2, 1), "conv3": (3, 1, 1), "conv4": (3, 1, 1), "conv5": (3, 1, 1)}


@pytest.mark.parametrize(
    ("num_channels", "second_lrn", "num_parameters"), [(3, True, 90_627_813), (20, False, 90_707_781)]
)
def test_layer_table_and_parameter_counts(num_channels, second_lrn, num_parameters):
    net = CNNM(num_channels, 101, second_lrn=second_lrn).eval()
    shapes = {}
    for name in LAYER_TABLE:
        net.get_submodule(name).register_forward_hook(
            lambda _layer, _inputs, output, name=name: shapes.update({name: tuple(output.shape[1:])})
        )
    with torch.inference_mode():
        assert net(torch.zeros(2, num_channels, 224, 224)).shape == (2, 101)
    assert shapes == LAYER_TABLE
    assert sum(parameter.numel() for parameter in net.parameters()) == num_parameters
    for name, (kernel, stride, padding) in CONVOLUTIONS.items():
        conv = net.features.get_submodule(name)
        assert (conv.kernel_size, conv.stride, conv.padding) == ((kernel,) * 2, (stride,) * 2, (padding,) * 2)
    assert isinstance(net.features.lrn2, LocalResponseNorm if second_lrn else nn.Identity)


def test_width_scales_channels_and_units():
    net = CNNM(3, 6, width=0.25, input_px=112, second_lrn=True)
    assert [p.shape[0] for p in net.parameters() if p.ndim > 1] == [24, 64, 128, 128, 128, 1024, 512, 6]


@pytest.mark.parametrize("input_px", range(41, 60))
def test_any_input_that_leaves_a_pixel_is_accepted(input_px):
    net = CNNM(2, 3, width=1 / 64, input_px=input_px, second_lrn=False).eval()
    assert net(torch.zeros(1, 2, input_px, input_px)).shape == (1, 3)


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="input_px=40 leaves no pixel.*at least 41"):
        CNNM(3, 2, input_px=40, second_lrn=True)
    with pytest.raises(ValueError, match=r"dropout=1.0 is not a ratio"):
        CNNM(3, 2, dropout=1.0, second_lrn=True)


def test_he_initialisation_is_seeded_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (CNNM(20, 5, width=0.25, input_px=64, second_lrn=False, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for layer in (first.features.conv3, first.full7):
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
        assert not layer.bias.any()
    assert torch.equal(first.full6.weight, again.full6.weight)
    assert not torch.equal(first.full6.weight, other.full6.weight)


@pytest.mark.parametrize("num_channels", [3, 24])
def test_response_normalisation_against_the_formula(num_channels):
    x = torch.randn(2, num_channels, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 60
    values = x.double().numpy()
    expected = np.empty_like(values)
    for c in range(num_channels):
        near = values[:, max(0, c - 2) : c + 3]  # n = 5 channels, fewer at the ends
        expected[:, c] = values[:, c] / (2 + 1e-4 * (near**2).sum(1)) ** 0.75
    norm = LocalResponseNorm(num_channels)
    np.testing.assert_allclose(norm(x).numpy(), expected, rtol=1e-5)
    torch.testing.assert_close(norm(x), nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), norm(x.clone()))
        np.testing.assert_allclose(norm(x).numpy(), expected, rtol=1e-5)  # in float32 all the same


def _passes(norm, x, dy):
    """Output and input gradient of a layer."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = norm(x)
    y.backward(dy.to(y.dtype))
    return y.detach(), x.grad


@pytest.mark.parametrize("num_channels", [2, 24])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_response_normalisation_has_the_gradient_that_autograd_finds(num_channels, memory_format):
    rng = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, num_channels, 4, 5, generator=rng).to(memory_format=memory_format) for _ in range(2))
    torch_norm = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0).double()
    norm = LocalResponseNorm(num_channels)
    (y, dx), expected = _passes(norm, 60 * x, dy), _passes(torch_norm, 60 * x.double(), dy.double())
    torch.testing.assert_close((y, dx), expected, check_dtype=False, rtol=1e-4, atol=1e-5)
    assert y.is_contiguous(memory_format=memory_format)
    low, dlow = _passes(norm, (60 * x).bfloat16(), dy)
    assert low.dtype == dlow.dtype == torch.bfloat16
    torch.testing.assert_close((low, dlow), expected, check_dtype=False, rtol=2e-2, atol=2e-2)


def test_response_normalisation_compiled_is_the_same(monkeypatch):
    """Compiled it sums shifted channels instead of convolving; this traces that form without generating code."""
    rng = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, 24, 4, 5, generator=rng) for _ in range(2))
    norm = LocalResponseNorm(24)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    expected = _passes(norm, 60 * x, dy)
    monkeypatch.setattr("torch.nn.functional.conv2d", None)
    torch.testing.assert_close(_passes(compiled, 60 * x, dy), expected)


# --- dropout -----------------------------------------------------------------------------------------------------


def draw(seed=3, step=7, **arguments):
    return draw_dropout_masks(seed, step, **{"num_units": (50, 20), "ratio": 0.9, "batch_size": 8, **arguments})


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_slice_the_same_masks(world_size):
    slices = [draw(rank=rank, world_size=world_size) for rank in range(world_size)]
    for layer, whole in enumerate(draw()):
        assert torch.equal(torch.cat([masks[layer] for masks in slices]), whole)


def test_masks_depend_on_seed_and_step_only():
    before = torch.get_rng_state()
    whole = torch.cat(draw(), 1)
    assert torch.equal(torch.cat(draw(), 1), whole)
    assert not torch.equal(torch.cat(draw(step=8), 1), whole)
    assert not torch.equal(torch.cat(draw(seed=4), 1), whole)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9])
def test_drop_statistics(ratio):
    (mask,) = draw(num_units=(4096,), batch_size=256, ratio=ratio)
    kept = (mask > 0).double()
    torch.testing.assert_close(mask, (kept / (1 - ratio)).float())
    # Five standard errors of a binomial share; columns and rows too, so that no unit or sample is favoured.
    for share, count in ((kept.mean(), kept.numel()), (kept.mean(0), 256), (kept.mean(1), 4096)):
        assert ((share - (1 - ratio)).abs() <= 5.5 * (ratio * (1 - ratio) / count) ** 0.5).all()


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_size=8 cannot be split evenly over 3 ranks"):
        draw(world_size=3)


def test_training_needs_masks_and_testing_takes_none():
    net = CNNM(3, 2, width=1 / 32, input_px=41, second_lrn=True)
    x = torch.ones(4, 3, 41, 41)
    with pytest.raises(ValueError, match="needs dropout masks"):
        net.train()(x)
    masks = net.draw_masks(0, 0, batch_size=4)
    assert [mask.shape for mask in masks] == [(4, net.full6.out_features), (4, net.full7.out_features)]
    zeros = tuple(torch.zeros_like(mask) for mask in masks)
    assert torch.equal(net(x, zeros), torch.zeros(4, 2))  # all dropped: only the last layer's bias is left
    assert net.eval()(x).any()
