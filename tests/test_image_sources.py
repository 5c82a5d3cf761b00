"""flow.image_sources: what is in folders and tars, and errors for what is not as it should be."""

import io
import tarfile

import pytest

from flow.image_sources import read_source, read_sources
from tests.test_images import write_folder, write_tar, write_tars


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources") / "folder"
    write_folder(root)
    return root


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources") / "tars"
    write_tars(root)
    return root


def test_without_names_classes_are_numbers(tars):
    found = read_source(str(tars))
    assert {source.class_name for source in found} == {"0", "1", "2"}
    assert all(source.class_name == str(source.class_id) for source in found)


def test_a_damaged_tar_is_no_shorter_set(tars, tmp_path):
    content = (tars / "t-0.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        third = tar.getmembers()[2]
    for name, damaged in {
        "header": content[: third.offset] + b"\xff" * 200 + content[third.offset + 200 :],
        "cut": content[: third.offset],
        "inside": content[: third.offset_data - 3000],
    }.items():
        (tmp_path / f"{name}.tar").write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}.tar: (damaged, or cut off|unexpected end of data)"):
            read_source(str(tmp_path / f"{name}.tar"))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([("a.jpg", b"x")], "sample 'a' has jpg; expected cls and one of"),
        ([("a.cls", b"1"), ("a.json", b"x")], "sample 'a' has cls, json; expected cls"),
        ([("a.cls", b"1"), ("a.jpg", b"x"), ("a.png", b"x")], "has cls, jpg, png"),
        ([("a.cls", b"ant"), ("a.jpg", b"x")], "has class b'ant'; expected a number from 0"),
        ([("a.cls", b"-1"), ("a.jpg", b"x")], "has class b'-1'; expected a number from 0"),
        ([("a.jpg", b"x"), ("a.jpg", b"x")], "duplicate file name"),
        ([("a.jpg", b"x"), ("a.cls", b"1"), ("b.cls", b"1"), ("b.jpg", b"x")] * 2, "both hold 't/a'"),
        ([("../a.jpg", b"x"), ("../a.cls", b"1")], "Video id 't/../a'"),
        ([], "holds no samples"),
    ],
)
def test_unusable_tars_are_explained(tmp_path, samples, message):
    with pytest.raises(ValueError, match=message):
        read_source(str(write_tar(tmp_path / "t.tar", samples)))


def test_a_number_needs_its_name(tars, tmp_path):
    for text, message in (("a\nb\n", "has class b'2.*0..1, which --classes names"), ("a\n\nb\n", "3 lines, 2 names")):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_sources(str(tars), None, tmp_path / "names.txt", 0)


def test_sources_that_do_not_fit_are_explained(folder, tars, tmp_path):
    with pytest.raises(ValueError, match="3 of the 3 classes in .* are not in .*'0'"):
        read_sources(str(folder), str(tars), None, 0)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").write_bytes(b"")
    (tmp_path / "a/2.avi").write_bytes(b"")
    with pytest.raises(ValueError, match="holds 1 images and 1 videos"):
        read_source(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--classes names the numbers in tars"):
        read_source(str(folder), ["ant", "bee", "cat"])
    with pytest.raises(ValueError, match="holds no image or video files"):
        read_source(str(tmp_path / "empty"))
