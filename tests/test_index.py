"""Opened sets: ids and rows."""

import re

import numpy as np
import pytest

from loaders import index as index_module
from loaders.index import open_index
from tests.conftest import VIDEOS


@pytest.fixture
def index(packed):
    return open_index(packed)


def test_rows_and_ids_are_inverse_in_any_order_and_with_repeats(index):
    ids = sorted(VIDEOS)
    chosen = [ids[i] for i in np.random.default_rng(0).integers(0, len(ids), 40)]
    rows = index.rows(chosen)
    assert index.video_ids(rows) == chosen
    assert [int(n) for n in index.num_frames[rows]] == [VIDEOS[video_id][0] for video_id in chosen]
    assert index.rows([]).tolist() == []


@pytest.mark.parametrize(
    "missing, near",
    [("run/lon", "run/long"), ("run/longer", "run/long"), ("Walk/tall ", "walk/tall"), ("rün/long", "run/long")],
)
def test_a_video_that_is_not_there_is_named_with_the_nearest(index, missing, near):
    with pytest.raises(ValueError, match=f"holds no video '{missing}'. Did you mean '{near}'"):
        index.rows(["run/long", missing])


@pytest.mark.parametrize("missing", ["", "xyz", "\U0001f600"])
def test_a_video_that_is_like_none_is_named_alone(index, missing):
    with pytest.raises(ValueError, match=f"holds no video '{missing}'. Lists in splits/ name those that it holds"):
        index.rows(["run/long", missing])


def test_of_a_large_set_the_videos_around_are_compared(index, monkeypatch):
    """Two of six: those between which the wrong id would stand, so that a typing error late in it is found."""
    monkeypatch.setattr(index_module, "MAX_COMPARED", 2)
    for video_id in VIDEOS:
        with pytest.raises(ValueError, match=f"Did you mean '{re.escape(video_id)}'"):
            index.rows([f"{video_id}x"])


def test_a_list_that_is_not_there_is_named_with_the_nearest(index):
    with pytest.raises(
        ValueError, match="no list 'split1_tets'; it has split1_test, split1_train. Did you mean 'split1_te"
    ):
        index.split("split1_tets")
    with pytest.raises(ValueError, match="no list 'al'; .*Did you mean 'all'"):
        index.split("al")


@pytest.mark.parametrize("end, ids", [("\n", 2), ("", 2), ("\nsit", None), ("", 0)])
def test_a_list_cut_off_loses_nobody(index, tmp_path, end, ids):
    """The last line counts, with a line feed or without; a name cut off is an error."""
    index.root = tmp_path
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/mine.txt").write_text("run/long\nwalk/wide" + end if ids != 0 else "")
    if ids is None:
        with pytest.raises(ValueError, match="holds no video 'sit', which splits/mine.txt lists. Correct the list"):
            index.split("mine")
    else:
        assert index.video_ids(index.split("mine")) == ["run/long", "walk/wide"][:ids]


def test_ids_of_one_hash_are_told_apart(index, monkeypatch):
    monkeypatch.setattr(index_module._Names, "hashes", lambda self: np.zeros(len(self.at), np.uint64))
    ids = list(VIDEOS)
    assert index.video_ids(index.rows(ids)) == ids
    with pytest.raises(ValueError, match="holds no video 'other'"):
        index.rows(["other"])


def test_names_are_compared_byte_by_byte_over_many_chunks(monkeypatch):
    """Against Python's own comparison, with chunks of 7 names."""
    monkeypatch.setattr(index_module, "_CHUNK", 7)
    rng = np.random.default_rng(1)
    words = ["".join(rng.choice(list("ab"), rng.integers(1, 6))) for _ in range(100)]
    text = np.frombuffer("".join(words).encode(), np.uint8)
    size = np.array([len(word) for word in words])
    names = index_module._Names(text, np.cumsum(size) - size, size)
    rows = rng.integers(0, 100, 100)
    same = names.equal(rows, names)
    assert same.tolist() == [words[row] == words[i] for i, row in enumerate(rows)]
    assert 0 < same.sum() < 100
    hashes = names.hashes()
    assert len(set(hashes.tolist())) == len(set(words))
