import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from farrier.targets.workspace import publish, publish_over, workspace


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


def fill(folder: Path, content: str) -> None:
    for name in ("one", "two"):
        (folder / name).write_text(content)


def content(folder: Path) -> set[str]:
    assert sorted(os.listdir(folder)) == ["one", "two"]
    return {path.read_text() for path in folder.iterdir()}


def test_publish_over_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    opened = (out / "one").open()
    for version in ("new", "newer"):
        with workspace(out) as partial:
            fill(partial, version)
            publish_over(partial, out)
        assert content(out) == {version}
        assert os.listdir(tmp_path) == ["out"]
    assert opened.read() == "old"
    opened.close()


def test_publish_over_where_names_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farrier.targets.workspace._exchange", lambda one, other: False)
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    with workspace(out) as partial:
        fill(partial, "new")
        publish_over(partial, out)
    assert content(out) == {"new"}
    assert os.listdir(tmp_path) == ["out"]


REPLACING = """
import sys
from pathlib import Path
from farrier.targets.workspace import publish_over, workspace
out = Path(sys.argv[1])
version = 0
while True:
    version += 1
    with workspace(out) as partial:
        for name in ("one", "two"):
            (partial / name).write_text(str(version))
        publish_over(partial, out)
    print(version, flush=True)
"""


def test_whenever_it_is_killed_one_of_the_two_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "0")
    for round_ in range(8):
        process = subprocess.Popen([sys.executable, "-c", REPLACING, str(out)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(1 + 3 * round_):
            process.stdout.readline()
        assert len(content(out)) == 1  # while it goes on, too
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert len(content(out)) == 1
    with workspace(out) as partial:
        assert os.listdir(partial) == []


def test_two_that_replace_at_once_take_turns(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "0")
    command = [sys.executable, "-c", REPLACING, str(out)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        for _ in range(20):
            assert process.stdout.readline(), process.stderr and process.stderr.read().decode()
    for process in processes:
        process.kill()
        process.communicate()
    assert len(content(out)) == 1
