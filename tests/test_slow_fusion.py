"""Slow fusion: convolutions in space and time, against torch's 3-D ones, and the layout of the 11 frames."""

import pytest
import torch
import torch.nn.functional as F

from nets.cnn_m import CNNM
from nets.slow_fusion import MERGES, NUM_FRAMES, MergeFrames, merge_layers


@pytest.mark.parametrize(("num_steps", "extent", "stride"), [(11, 5, 2), (4, 2, 2), (2, 2, 2), (10, 4, 2), (5, 3, 1)])
def test_merging_and_a_2d_convolution_are_a_convolution_in_space_and_time(num_steps, extent, stride):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, num_steps, 4, 9, 11, generator=generator)
    weight = torch.randn(6, extent * 4, 3, 3, generator=generator)
    by_time = x.transpose(0, 1).flatten(0, 1).to(memory_format=torch.channels_last)
    merged = MergeFrames(num_steps, extent, stride)(by_time)
    assert merged.is_contiguous(memory_format=torch.channels_last)
    ours = F.conv2d(merged, weight).unflatten(0, (-1, 3)).transpose(0, 1)
    in_time = weight.unflatten(1, (extent, 4)).transpose(1, 2)  # (6, 4, extent, 3, 3)
    theirs = F.conv3d(x.transpose(1, 2), in_time, stride=(stride, 1, 1)).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_all_eleven_frames_end_in_one_map_and_each_counts():
    assert [(layer.num_steps, layer.num_merged) for layer in merge_layers(NUM_FRAMES)] == [(11, 4), (4, 2), (2, 1)]
    net = CNNM(3, 5, width=1 / 16, input_px=64, second_lrn=True, num_frames=11).eval()
    inputs = torch.randn(2, 33, 64, 64, requires_grad=True)
    logits = net(inputs)
    assert logits.shape == (2, 5)
    (gradient,) = torch.autograd.grad(logits[0].sum(), inputs)
    reach = gradient[0].unflatten(0, (11, 3)).abs().sum(dim=(1, 2, 3))
    assert (reach > 0).all() and gradient[1].abs().sum() == 0


def test_the_first_layers_see_part_of_the_time_each():
    net = CNNM(3, 5, width=1 / 16, input_px=64, second_lrn=True, num_frames=11)
    shapes = {name: tuple(net.features.get_submodule(name).weight.shape[:2]) for name in ("conv1", "conv2", "conv3")}
    assert shapes == {"conv1": (6, 5 * 3), "conv2": (16, 2 * 6), "conv3": (32, 2 * 16)}  # not 33 channels into conv1
    single = CNNM(3, 5, width=1 / 16, input_px=64, second_lrn=True)
    for name, value in single.state_dict().items():
        other = net.state_dict()[name]
        extents = {f"features.conv{i}.weight": extent for i, (extent, _) in enumerate(MERGES, 1)}
        assert other.shape[1:2] == (value.shape[1] * extents.get(name, 1),) if value.ndim > 1 else True


def test_other_numbers_of_frames_are_refused():
    with pytest.raises(ValueError, match="num_frames=10: a net sees 1 frame, or 11 by slow fusion"):
        CNNM(3, 5, second_lrn=True, num_frames=10)
