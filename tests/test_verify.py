"""flow.verify: whole sets pass, every damage is named, and an index is rebuilt from sound tars only."""

import json
import shutil

import pytest

from flow import verify
from flow.clips import read_clips
from flow.index import INDEX_NAME
from flow.shard import member_name


@pytest.fixture()
def copy(packed_demo, tmp_path):
    """A copy of a packed set, to be damaged."""
    return shutil.copytree(packed_demo, tmp_path / "set")


def shard(root):
    return sorted(root.glob("shard-*.tar"))[0]


def place(root, clip_number, kind, at):
    """(name, offset, size) of an image in the first shard."""
    clip = list(read_clips(shard(root)))[clip_number]
    first, entries = clip.entries[kind]
    row = entries[at]
    return member_name(clip.video_id, 0, kind, first + at), int(row["offset"]), int(row["size"])


def overwrite(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def damages(root, **options):
    return verify.verify(root, num_workers=1, **options).damages


@pytest.mark.parametrize("deep", [False, True])
def test_a_whole_set_is_clean(packed_demo, deep):
    report = verify.verify(packed_demo, deep, num_workers=2)
    dataset = json.loads((packed_demo / "dataset.json").read_text())
    assert report.damages == [] and report.num_members == dataset["num_frames"] + 2 * dataset["num_fields"]


def test_every_damaged_image_is_named(copy):
    places = [place(copy, 0, "rgb", 3), place(copy, 0, "dx", 0), place(copy, 4, "dy", 7)]
    for _, offset, size in places:
        overwrite(shard(copy), offset + size // 2, b"damage")
    found = damages(copy)
    assert len(found) == 4 and "SHA-256" in found[0]
    for (name, offset, _), line in zip(places, found[1:], strict=True):
        assert f"{shard(copy).name}: {name} at offset {offset}: damaged" in line


def test_behind_a_damaged_tar_header_the_index_leads_on(copy):
    header_of, offset, _ = place(copy, 1, "rgb", 0)
    behind = place(copy, 5, "dx", 2)
    overwrite(shard(copy), offset - 512, b"\xff" * 300)
    overwrite(shard(copy), behind[1] + 40, b"damage")
    found = damages(copy)
    assert any(f"damaged tar header at offset {offset - 512}" in line for line in found)
    assert any(f"{behind[0]} at offset {behind[1]}: damaged" in line for line in found)
    assert not any(header_of in line and ": damaged" in line for line in found), "the image itself is whole"
    total = json.loads((copy / "dataset.json").read_text())
    assert verify.verify(copy, num_workers=1).num_members == total["num_frames"] + 2 * total["num_fields"]


def test_a_shard_cut_off_missing_or_foreign_is_named(copy):
    content = shard(copy).read_bytes()
    shard(copy).write_bytes(content[: len(content) // 2])
    assert any(f"has {len(content) // 2} bytes, {len(content)} were written" in line for line in damages(copy))
    shard(copy).rename(copy / "shard-000099.tar")
    found = damages(copy)
    assert any("shard-000000.tar: is missing" in line for line in found)
    assert any("shard-000099.tar: is no part of this data set" in line for line in found)


def test_an_index_that_differs_from_the_tars_is_named(copy):
    path = copy / INDEX_NAME
    content = path.read_bytes()
    at = len(content) - len(content) // 4
    overwrite(path, at, bytes([content[at] ^ 1]))
    assert any("index: " in line and "--rebuild-index" in line for line in damages(copy))
    path.write_bytes(content[:100])
    assert any(INDEX_NAME in line and "damaged" in line for line in damages(copy))


def test_a_split_that_names_unknown_videos_is_named(copy):
    with open(copy / "splits/split1_test.txt", "a") as file:
        file.write("RedUp/stranger\n")
    assert damages(copy) == ["splits/split1_test.txt: 'RedUp/stranger' is in no shard."]


def test_the_rebuilt_index_equals_the_original(copy, capsys):
    original = (copy / INDEX_NAME).read_bytes()
    (copy / INDEX_NAME).unlink()
    assert verify.main([str(copy)]) == 1 and INDEX_NAME in capsys.readouterr().out
    assert verify.main([str(copy), "--rebuild-index"]) == 0 and "was rebuilt" in capsys.readouterr().out
    assert (copy / INDEX_NAME).read_bytes() == original
    (copy / "dataset.json").unlink()
    (copy / INDEX_NAME).unlink()
    assert verify.main([str(copy), "--rebuild-index"]) == 0, "the tars alone are enough"
    assert (copy / INDEX_NAME).read_bytes() == original


def test_rebuilding_does_not_launder_damage(copy, capsys):
    name, offset, size = place(copy, 2, "dy", 1)
    overwrite(shard(copy), offset + size // 2, b"damage")
    (copy / INDEX_NAME).unlink()
    (copy / "dataset.json").unlink()
    assert verify.main([str(copy), "--rebuild-index"]) == 1
    output = capsys.readouterr().out
    assert name in output and "was not touched" in output and not (copy / INDEX_NAME).exists()


def test_what_is_no_packed_set_is_an_error(tmp_path, capsys):
    assert verify.main([str(tmp_path)]) == 2 and "it has no dataset.json" in capsys.readouterr().err
    assert verify.main([str(tmp_path), "--rebuild-index"]) == 2 and "no shard-" in capsys.readouterr().err
    (tmp_path / "dataset.json").write_text("{")
    assert verify.main([str(tmp_path)]) == 2 and "is damaged" in capsys.readouterr().err


def test_the_command(packed_demo, capsys):
    assert verify.main([str(packed_demo), "--deep", "--workers", "1"]) == 0
    assert "0 damages" in capsys.readouterr().out
