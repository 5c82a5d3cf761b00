"""flow.demo: each stream can know its half of the class, and no more."""

from itertools import product

import numpy as np
import pytest

from flow import demo
from flow.catalog import read_catalog
from flow.extract import flow_method
from flow.fields import field_mean, subtract_mean
from flow.video import read_frames, to_grey

SIZE = (128, 96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "videos"
    assert demo.generate(folder, num_train=2, num_test=1, num_frames=6)
    return folder


def film(number, appearance, motion, num_frames=4):
    return list(demo.render(demo.draw_scene(0, number, *SIZE), appearance, motion, num_frames, *SIZE))


def test_the_files_are_a_data_set_like_ucf101(folder):
    catalog = read_catalog(folder, folder / "splits")
    assert catalog.name == "ucf101" and not catalog.missing and not catalog.unlisted
    assert [len(catalog.splits[f"split1_{side}"]) for side in ("train", "test")] == [12, 6]
    assert sorted(catalog.official_ids.values()) == [1, 2, 3, 4, 5, 6]
    frames = list(read_frames(catalog.videos[0].path))
    assert len(frames) == 6 and frames[0].shape == (96, 128, 3)


def test_generating_again_does_nothing_and_spoils_nothing(folder):
    assert not demo.generate(folder, num_train=2, num_test=1, num_frames=6)
    with pytest.raises(ValueError, match="is not this demo data set"):
        demo.generate(folder, num_train=2, num_test=1, num_frames=6, seed=1)
    with pytest.raises(ValueError, match="at least one scene on each side"):
        demo.generate(folder.parent / "none", num_test=0)


def test_the_seed_decides(folder, tmp_path):
    demo.generate(tmp_path / "same", num_train=2, num_test=1, num_frames=6)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.*"))
    assert files and all((folder / name).read_bytes() == (tmp_path / "same" / name).read_bytes() for name in files)
    other = demo.draw_scene(1, 1, *SIZE)
    assert not np.array_equal(other.background, demo.draw_scene(0, 1, *SIZE).background)


@pytest.mark.parametrize("motion", demo.MOTIONS)
def test_the_temporal_stream_cannot_see_the_appearance(motion):
    red, green = (np.array([to_grey(frame) for frame in film(1, name, motion)], int) for name in demo.APPEARANCES)
    assert np.abs(red - green).max() <= 1


def test_the_spatial_stream_cannot_see_the_motion():
    # Frame 0 is the same; later, sprites are elsewhere, but nowhere that tells where they came from.
    first = [film(1, "Red", motion)[0] for motion in demo.MOTIONS]
    assert all(np.array_equal(frame, first[0]) for frame in first)
    places = np.concatenate([demo.draw_scene(0, n, *SIZE).places for n in range(100)]) % (168, 136) / (168, 136)
    for t, motion in product((0, 23), demo.MOTIONS.values()):
        moved = (places + t * 3.7 * np.array(motion) / (168, 136)) % 1
        counts = np.histogram2d(*moved.T, bins=3, range=[[0, 1], [0, 1]])[0]
        assert counts.min() > 0.6 * counts.mean()


def test_the_appearance_is_in_every_frame():
    for number, motion in product(range(1, 4), demo.MOTIONS):
        for frame in film(number, "Red", motion):
            assert (frame[..., 0].astype(int) - frame[..., 1]).max() > 30
        for frame in film(number, "Green", motion):
            assert (frame[..., 1].astype(int) - frame[..., 0]).max() > 30


@pytest.mark.parametrize("size_px", [64, 96])
def test_the_motion_is_in_the_field_after_mean_subtraction(folder, size_px):
    method = flow_method()
    for video in read_catalog(folder, folder / "splits").videos:
        greys = [to_grey(frame) for frame in read_frames(video.path, size_px)]
        total = np.zeros(2)
        for pair in zip(greys, greys[1:], strict=False):
            field = method(*pair)
            field = subtract_mean(field, field_mean(field))
            # Sprites cover less than half of the image: what deviates most from the mean is them.
            total += field[:, np.hypot(*field) > 1].sum(axis=1)
        found = "Sideways" if abs(total[0]) > abs(total[1]) else "Up" if total[1] < 0 else "Down"
        assert video.class_name.endswith(found)


def test_the_camera_moves_the_whole_field():
    scene = demo.draw_scene(0, 2, *SIZE)
    greys = [to_grey(frame) for frame in film(2, "Red", "Up", 2)]
    median = np.median(flow_method()(*greys), axis=(1, 2))
    assert np.hypot(*scene.camera) > 0.5 and np.abs(median - scene.camera).max() < 0.4


def test_the_command(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "d"), "--train", "1", "--test", "1", "--frames", "2"]
    assert demo.main(arguments) == 0 and "12 clips" in capsys.readouterr().out
    assert demo.main(arguments) == 0 and "there already" in capsys.readouterr().out
    assert demo.main([*arguments, "--seed", "1"]) == 2 and "error:" in capsys.readouterr().err
