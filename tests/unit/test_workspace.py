import os
from pathlib import Path

import pytest

from farrier.targets.workspace import publish, workspace


def test_what_is_published_is_there_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with workspace(out) as partial:
        (partial / "folder").mkdir()
        (partial / "folder" / "file").write_text("content")
        assert not out.exists()
        publish(partial, out)
    assert (out / "folder" / "file").read_text() == "content"
    assert os.listdir(out.parent) == ["out"]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fill(partial: Path) -> None:
        (partial / "folder").mkdir()
        (partial / "folder").write_text("this fails")

    with pytest.raises(IsADirectoryError), workspace(tmp_path / "out") as partial:
        fill(partial)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    (left / "folder").mkdir(parents=True)
    (left / "folder" / "file").write_text("half")
    (left / "file").write_text("half")
    (left / "link").symlink_to("folder")
    with workspace(tmp_path / "out") as partial:
        assert os.listdir(partial) == []


def test_publish_does_not_replace(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("precious")
    with pytest.raises(OSError, match="not empty"), workspace(tmp_path / "out") as partial:
        publish(partial, tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "precious"
