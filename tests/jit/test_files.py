"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import stat
import threading

import pytest

from jitnorm.jit import files
from jitnorm.jit.files import replace_file, write_json, write_text


def test_json_is_replaced(tmp_path):
    path = tmp_path / "x.json"
    for value in ({"a": [1, 2]}, {"b": None}):
        write_json(path, value)
        assert json.loads(path.read_text()) == value
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_text(path, "old")

    def full(fd, content):
        os.write(fd, content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_all", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new content")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, content: real(fd, content[:3]))
    replace_file(str(tmp_path / "x"), b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_a_draft_that_another_process_takes_for_abandoned(tmp_path, monkeypatch):
    removed = []

    def lock(fd):
        if not removed:
            removed.append(os.readlink(f"/proc/self/fd/{fd}"))
            os.unlink(removed[0])

    monkeypatch.setattr(files, "lock", lock)
    write_text(tmp_path / "x", "content")
    assert removed and (tmp_path / "x").read_text() == "content"


def test_modes_and_links_of_a_users_file_stay(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o640)
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "made", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o640


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    thread = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    thread.start()
    write_text(tmp_path / "pipe", "through")
    thread.join(30)
    assert read == ["through"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
