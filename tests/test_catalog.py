"""flow.catalog: folders and official lists, as published."""

import pytest

from flow.catalog import (
    list_videos,
    read_catalog,
    read_hmdb51_lists,
    read_ucf101_lists,
    seeded_order,
    split_by_folder,
)


def make_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def ids(videos):
    return [video.video_id for video in videos]


def test_ids_are_paths_and_classes_are_folders(tmp_path):
    root = make_files(
        tmp_path, "B/001.mp4", "A/001.mp4", "deep/C/x.y.AVI", "A/notes.txt", "A/._001.mp4", ".tmp/A/2.avi"
    )
    videos = list_videos(root)
    assert ids(videos) == ["A/001", "B/001", "deep/C/x.y"]
    assert [video.class_name for video in videos] == ["A", "B", "C"]
    assert videos[2].path == root / "deep/C/x.y.AVI"


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    make_files(tmp_path / "elsewhere", "1.avi")
    root = make_files(tmp_path / "root", "A/1.avi")
    (root / "B").symlink_to(tmp_path / "elsewhere")
    (root / "B" / "circle").symlink_to(root)
    assert ids(list_videos(root)) == ["A/1", "B/1"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["A/a.avi", "A/a.mp4"], "a.avi and .*a.mp4 have the same id 'A/a'"),
        (["a.avi"], "lies in no class folder.*sort files that lie flat"),
        (["A/__a__.avi"], "WebDataset readers skip names"),
        (["A/new\nline.avi"], "control character"),
        (["A/notes.txt"], "holds no video files"),
    ],
)
def test_unusable_names_are_refused(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        list_videos(make_files(tmp_path, *names))


def test_an_absent_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        list_videos(tmp_path / "absent")


def test_the_seeded_order_is_a_permutation_that_the_seed_decides():
    names = [f"A/{n}" for n in range(50)]
    assert sorted(seeded_order(names, 0)) == sorted(names)
    assert seeded_order(names, 0) == seeded_order(names[::-1], 0) != seeded_order(names, 1)


def test_the_split_by_folder_is_disjoint_whole_and_fair(tmp_path):
    sizes = {"one": 1, "two": 2, "ten": 10, "many": 97}
    videos = list_videos(
        make_files(tmp_path, *(f"{name}/{n}.avi" for name, size in sizes.items() for n in range(size)))
    )
    splits = split_by_folder(videos, seed=3)
    train, test = (set(splits[f"split1_{side}"]) for side in ("train", "test"))
    assert train.isdisjoint(test) and train | test == set(ids(videos))
    counts = {name: sum(video_id.startswith(name) for video_id in test) for name in sizes}
    assert counts == {"one": 0, "two": 1, "ten": 3, "many": 29}
    assert split_by_folder(videos, seed=4) != splits == split_by_folder(videos, seed=3)
    # A class's split does not depend on the other classes.
    assert set(split_by_folder([v for v in videos if v.class_name == "ten"], 3)["split1_test"]) < test


def write_ucf101(folder, train, test, classes="1 Archery\r\n2 YoYo\r\n"):
    folder.mkdir()
    for name, text in {"classInd": classes, "trainlist01": train, "testlist01": test}.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    return folder


def test_ucf101_lists_with_crlf(tmp_path):
    root = make_files(tmp_path / "v", "Archery/v_1.avi", "YoYo/v_2.mp4", "YoYo/v_3.avi", "Unknown/v_4.avi")
    lists = write_ucf101(
        tmp_path / "s",
        "Archery/v_1.avi 1\r\nYoYo/v_2.avi 2\r\nYoYo/v_9.avi 2\r\n",
        "YoYo/v_3.avi\r\nArchery/v_8.avi\r\n",
    )
    catalog = read_catalog(root, lists)
    assert catalog.name == "ucf101"
    assert catalog.splits == {"split1_train": ["Archery/v_1", "YoYo/v_2"], "split1_test": ["YoYo/v_3"]}
    assert catalog.missing == ["YoYo/v_9", "Archery/v_8"] and catalog.unlisted == ["Unknown/v_4"]
    assert catalog.official_ids == {"Archery": 1, "YoYo": 2} and len(catalog.videos) == 4


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("Archry/v_1.avi 1\r\n", "", "line 1: 'Archry' is no class of classInd.txt. Did you mean 'Archery'"),
        ("Archery/v_1.avi 2\r\n", "", "trainlist01.txt, line 1: label 2 for 'Archery', 1 in classInd"),
        ("Archery/v_1.avi 1\r\n", "\r\nArchery/v_1.avi\r\n", "'Archery/v_1' stands in split1_train and in split1_test"),
        ("Archery/v_1.avi one\r\n", "", "line 1: .* is not a video's file name and a number"),
        ("UCF/Archery/v_1.avi\r\n", "", "name none of the 1 videos.*'UCF/Archery/v_1'.*'Archery/v_1'"),
    ],
)
def test_contradictory_lists_are_refused(tmp_path, train, test, message):
    root = make_files(tmp_path / "v", "Archery/v_1.avi")
    with pytest.raises(ValueError, match=message):
        read_catalog(root, write_ucf101(tmp_path / "s", train, test))


STRANGE = "Golf_Tips_-_Hit_[300+]_(Yards)!!!_golf_f_nm_np1_fr_med_0"


def test_hmdb51_lists_with_strange_names(tmp_path):
    root = make_files(tmp_path / "v", f"golf/{STRANGE}.avi", "golf/b.avi", "golf/c.avi", "shoot_ball/d.avi")
    lists = tmp_path / "s"
    lists.mkdir()
    (lists / "golf_test_split1.txt").write_text(f"{STRANGE}.avi 2 \nb.avi 1 \nc.avi 0 \n")
    (lists / "golf_test_split2.txt").write_text(f"{STRANGE}.avi 1 \nb.avi 0 \nc.avi 2 \n")
    (lists / "shoot_ball_test_split1.txt").write_text("d.avi 1 \ne.avi 2 \n")
    catalog = read_catalog(root, lists)
    assert catalog.name == "hmdb51" and catalog.official_ids == {}
    assert catalog.splits["split1_train"] == ["golf/b", "shoot_ball/d"]
    assert catalog.splits["split1_test"] == catalog.splits["split2_train"] == [f"golf/{STRANGE}"]
    assert catalog.splits["split2_test"] == ["golf/c"] and catalog.missing == ["shoot_ball/e"]
    (lists / "golf_test_split1.txt").write_text("b.avi 3\n")
    with pytest.raises(ValueError, match="golf_test_split1.txt, line 1: 3 after 'b'; expected 0"):
        read_hmdb51_lists(lists)


def test_the_data_set_is_told_by_its_lists_or_asked_for(tmp_path):
    root = make_files(tmp_path / "v", "A/1.avi", "A/2.avi")
    (tmp_path / "s").mkdir()
    assert read_catalog(root).name == "folder"
    for arguments, message in (
        ((tmp_path / "s",), "holds neither UCF-101's lists"),
        ((tmp_path / "absent",), "is no folder"),
        ((None, "ucf101"), "needs its official list files"),
        ((tmp_path / "s", "folder"), "does not read the lists"),
        ((tmp_path / "s", "kinetics"), "there are ucf101, hmdb51 and folder"),
        ((tmp_path / "s", "ucf101"), "lacks classInd.txt"),
        ((tmp_path / "s", "hmdb51"), "holds no <class>_test_split1.txt"),
    ):
        with pytest.raises(ValueError, match=message):
            read_catalog(root, *arguments)


def test_the_published_lists(real_data):
    ucf101 = read_ucf101_lists(real_data / "ucf101_mini/splits")
    assert len(ucf101.official_ids) == 101
    assert [len(ids) for ids in ucf101.splits.values()] == [9537, 3783, 9586, 3734, 9624, 3696]
    hmdb51 = read_hmdb51_lists(real_data / "hmdb51_mini/splits")
    assert sorted(len(ids) for ids in hmdb51.splits.values()) == [1530] * 3 + [3570] * 3
    catalog = read_catalog(real_data / "ucf101_mini/videos", real_data / "ucf101_mini/splits")
    assert [len(ids) for ids in catalog.splits.values()] == [155, 56, 158, 53, 154, 57] and not catalog.unlisted
    catalog = read_catalog(real_data / "hmdb51_mini/videos", real_data / "hmdb51_mini/splits")
    assert len(catalog.videos) == 10 and not catalog.unlisted
