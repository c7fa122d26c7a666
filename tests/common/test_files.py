"""Files that are there complete or not at all."""

import os
import time
from pathlib import Path

import pytest

from crosskd_ifc.common.files import read_json_if_any, replacing, write_json


def test_two_writers_of_one_file_dont_disturb_each_other(tmp_path):
    path = tmp_path / "model.pth"
    with replacing(str(path)) as first:
        first.write(b"first, ")
        with replacing(str(path)) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
        first.write(b"complete")
    assert path.read_bytes() == b"first, complete"
    assert os.listdir(tmp_path) == ["model.pth"]


def test_a_writer_that_fails_leaves_the_file_as_it_was(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(KeyError), replacing(str(tmp_path / "a")) as f:
        f.write(b"half")
        raise KeyError
    assert (tmp_path / "a").read_text() == "before" and os.listdir(tmp_path) == ["a"]


def test_what_a_killed_writer_left_is_removed_by_a_later_one(tmp_path):
    left = []
    for name in ("a", "a", "b"):
        before = set(os.listdir(tmp_path))
        with replacing(str(tmp_path / name)):
            (half,) = set(os.listdir(tmp_path)) - before
        left.append(tmp_path / half)
        (tmp_path / name).unlink()
    old, new, other = left
    for path in left:
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (time.time() - 4000,) * 2)
    with replacing(str(tmp_path / "a")) as f:
        f.write(b"all")
    assert sorted(os.listdir(tmp_path)) == sorted(["a", new.name, other.name])


def test_a_file_may_have_a_name_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("細胞" * 41 + "-a.jpg")
    with replacing(str(path)) as f:
        f.write(b"all")
    assert len(os.fsencode(path.name)) > 250 and path.read_bytes() == b"all"


def test_a_file_gets_the_mode_of_any_new_file(tmp_path):
    with replacing(str(tmp_path / "a")) as f:
        f.write(b"all")
    (tmp_path / "b").write_text("plain")
    assert os.stat(tmp_path / "a").st_mode == os.stat(tmp_path / "b").st_mode


def test_json_holds_null_where_there_is_no_number(tmp_path):
    path = str(tmp_path / "a.json")
    write_json(path, {"AP": float("nan"), "more": [{"b": -float("inf")}, (1.5, "x", None, True)]})
    assert "NaN" not in Path(path).read_text() and "Infinity" not in Path(path).read_text()
    assert read_json_if_any(path) == {"AP": None, "more": [{"b": None}, [1.5, "x", None, True]]}
