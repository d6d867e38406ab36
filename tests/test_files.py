"""Files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rectgrad_ref.errors import OutputError
from rectgrad_ref.files import atomic_write


def test_replaces_a_file_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    path.write_text("old")
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".png"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "map.npz"
    path.write_text("old")
    with pytest.raises(type(failure)), atomic_write(str(path)) as temporary:
        temporary.write_text("half")
        raise failure
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    with pytest.raises(OutputError, match=r"map\.png: No space left"), atomic_write(path):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["absent", "file"])
def test_a_folder_that_cannot_be_written_to(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / folder / "map.png"
    with pytest.raises(OutputError, match=f"cannot write .*{folder}"), atomic_write(path):
        raise AssertionError("must not get here")


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    path.mkdir()
    with pytest.raises(OutputError, match="cannot write"), atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.is_dir() and list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_the_umask_allows(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    mask = os.umask(0o027)
    try:
        with atomic_write(path) as temporary:
            temporary.write_text("new")
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o640
