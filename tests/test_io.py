"""Files and folders are written whole or not at all."""

import errno
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from fromage import io
from fromage.errors import UserError
from fromage.io import WholeFile, check_new, fill_once, json_object, set_aside, whole_folder, write_files, writing
from fromage.locks import LOCK


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_takes_its_name_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "deep" / "a"
    with WholeFile(path) as part:
        part.write_bytes(b"new")
        assert not path.exists()
    assert content(path.parent) == {"a": b"new"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_former_file_and_no_part(tmp_path, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(error), WholeFile(path) as part:
        part.write_bytes(b"ne")
        raise error
    assert content(tmp_path) == {"a": b"old"}


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), WholeFile(tmp_path / "a"):
        pass
    assert content(tmp_path) == {}


def killed(path):
    with WholeFile(path) as part:
        part.write_bytes(b"ne")
        os._exit(9)


def test_a_kill_leaves_the_former_file_and_the_next_writer_takes_over_the_part(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    writer = multiprocessing.get_context("fork").Process(target=killed, args=(path,))
    writer.start()
    writer.join()
    assert writer.exitcode == 9 and path.read_bytes() == b"old"
    with WholeFile(path) as part:
        part.write_bytes(b"new")
    assert content(tmp_path) == {"a": b"new"}


def test_threads_that_share_a_file_write_a_part_each(tmp_path):
    parts, barrier = set(), threading.Barrier(4)

    def write(text):
        with WholeFile(tmp_path / "a", shared=True) as part:
            part.write_bytes(text)
            barrier.wait()
            parts.add(part)

    threads = [threading.Thread(target=write, args=(bytes([i]) * 1000,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (data,) = content(tmp_path).values()
    assert len(parts) == 4 and len(data) == 1000 and len(set(data)) == 1


def test_of_several_files_none_is_replaced_unless_all_are_on_disk(tmp_path):
    write_files(tmp_path, {"a": b"1", "b": b"2"})
    (tmp_path / ".c.part").mkdir()  # cannot be written
    with pytest.raises(UserError, match="cannot be written"):
        write_files(tmp_path, {"a": b"3", "c": b"4"})
    (tmp_path / ".c.part").rmdir()
    assert content(tmp_path) == {"a": b"1", "b": b"2"}


def test_a_folder_replaces_the_former_one_when_it_is_whole(tmp_path):
    folder = tmp_path / "deep" / "out"
    for text in (b"old", b"new"):
        with whole_folder(folder) as new:
            (new / text.decode()).write_bytes(text)
        assert content(folder) == {text.decode(): text}
    with pytest.raises(KeyError), whole_folder(folder) as new:
        (new / "half").touch()
        raise KeyError
    assert content(folder) == {"new": b"new"} and [path.name for path in folder.parent.iterdir()] == ["out"]


def test_where_the_second_renaming_fails_the_former_folder_is_back(tmp_path, monkeypatch):
    folder, rename = tmp_path / "out", type(tmp_path).rename
    with whole_folder(folder) as new:
        (new / "old").touch()

    def fails(path, to):
        if path.name.endswith(".new"):
            assert set_aside(folder).exists()
            raise OSError("interrupted")
        return rename(path, to)

    monkeypatch.setattr(type(tmp_path), "rename", fails)
    with pytest.raises(OSError, match="interrupted"), whole_folder(folder):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and set(content(folder)) == {"old"}


def test_a_full_disk_is_told_with_what_is_kept_and_leaves_no_part(tmp_path, disk):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    disk(2000)
    with pytest.raises(UserError, match=r"a: .*\(File too large\); .* before is untouched; make"), WholeFile(path) as part:
        part.write_bytes(bytes(4000))
    kept = WholeFile(tmp_path / "b", kept="three shards are kept")
    with pytest.raises(UserError, match=r"b: .*; three shards are kept; make room"), kept as part, part.open("wb") as file:
        file.write(bytes(4000))
    assert content(tmp_path) == {"a": b"old"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "x"),
            r"out: cannot be written \(No space left on device\); nothing is left of it; make room",
        ),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded"),
        (PermissionError(errno.EACCES, "x", "/mnt/out"), r"out: cannot be written \(Permission denied\).*permissions"),
        (OSError(errno.EROFS, "x", "/mnt/.out.part"), r"/mnt/out: cannot be written \(Read-only file system\)"),
        (PermissionError(errno.EACCES, "x", "/home/photo.jpg"), r"^/home/photo.jpg: cannot be opened \(Permission denied\)"),
    ],
)
def test_what_a_disk_refuses_is_one_line(error, said):
    with pytest.raises(UserError, match=said) as told, writing(Path("/mnt/out")):
        raise error
    assert len(str(told.value).splitlines()) == 1


def test_errors_of_another_kind_stay_what_they_are():
    with pytest.raises(IsADirectoryError), writing(Path("/mnt/out")):
        raise IsADirectoryError(errno.EISDIR, "x")


def test_what_is_there_is_not_replaced_without_a_word(tmp_path):
    check_new(tmp_path / "new")
    check_new(tmp_path)  # an empty folder
    (tmp_path / LOCK).touch()
    check_new(tmp_path)
    (tmp_path / "a").touch()
    for path in (tmp_path, tmp_path / "a"):
        with pytest.raises(UserError, match=r"is there already.*--overwrite"):
            check_new(path)
        check_new(path, overwrite=True)


def test_a_folder_that_another_makes_is_waited_for(tmp_path, monkeypatch):
    made, begun, go = [], threading.Event(), threading.Event()
    monkeypatch.setattr("fromage.io.WAIT", 0.01)

    def fill(folder):
        made.append(folder)
        begun.set()
        go.wait(60)
        (folder / "a").write_text("x")

    threads = [threading.Thread(target=fill_once, args=(tmp_path / "out", fill)) for _ in range(3)]
    threads[0].start()
    assert begun.wait(60)
    for thread in threads[1:]:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(10)
    assert len(made) == 1 and content(tmp_path / "out") == {"a": b"x"}
    fill_once(tmp_path / "out", pytest.fail)


@pytest.mark.parametrize("data", ["", b"", "[1]", "null", b"{", b"\xff", '{"a": ' + "[" * 100_000, "1" * 5000])
def test_what_is_no_json_object_is_read_as_an_empty_one(data):
    assert json_object(data) == {}
    assert json_object('{"a": [1]}') == json_object(b'{"a": [1]}') == {"a": [1]}


def test_a_link_to_a_folder_stays_a_link_to_the_one_that_replaces_it(tmp_path):
    for path in (tmp_path / "real", tmp_path / "link"):
        if path.name == "link":
            path.symlink_to(tmp_path / "real")
        with whole_folder(path) as new:
            (new / path.name).touch()
    assert (tmp_path / "link").is_symlink() and set(content(tmp_path / "real")) == {"link"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_what_killed_processes_left_of_a_folder_goes_and_that_of_others_stays(tmp_path):
    for name in (".out.1.new", ".out.22.new", ".out.333.new", ".out.x.3.new", ".other.4.new"):
        (tmp_path / name).mkdir()
        if name != ".out.333.new":  # which another process may be making, where there are no locks
            os.utime(tmp_path / name, (1e9, 1e9))
    with whole_folder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.4.new", ".out.333.new", ".out.x.3.new", "out"]


@pytest.fixture
def steps(monkeypatch):
    """What is forced to disk, renamed and removed, in this order, by the name of the file or folder."""
    done = []
    fsync, rename, replace, rmtree = os.fsync, Path.rename, Path.replace, io.shutil.rmtree

    def noted(what, act):
        def step(path, *args, **kwargs):
            named = Path(f"/proc/self/fd/{path}").readlink() if what == "disk" else Path(path)
            done.append((what, named.name))
            return act(path, *args, **kwargs)

        return step

    monkeypatch.setattr(os, "fsync", noted("disk", fsync))
    monkeypatch.setattr(Path, "rename", noted("name", rename))
    monkeypatch.setattr(Path, "replace", noted("name", replace))
    monkeypatch.setattr(io.shutil, "rmtree", noted("gone", rmtree))
    return done


def test_a_file_is_on_disk_before_it_takes_its_name(tmp_path, steps):
    with WholeFile(tmp_path / "a") as part:
        part.write_bytes(b"new")
    write_files(tmp_path, {"b": b"1"})
    assert steps == [("disk", ".a.part"), ("name", ".a.part"), ("disk", ".b.part"), ("name", ".b.part")]


def test_a_folder_is_on_disk_before_the_former_one_goes(tmp_path, steps):
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as new:
        (new / "deep").mkdir()
        (new / "deep" / "a").write_bytes(b"new")
        (new / "gone").symlink_to(tmp_path / "nowhere")
    named = steps.index(("name", "out"))
    assert {("disk", name) for name in ("a", "deep", new.name)} <= {*steps[:named]}
    parent = steps.index(("disk", tmp_path.name))
    assert steps.index(("name", new.name)) < parent < len(steps) - 1 - steps[::-1].index(("gone", ".out.old"))


def test_a_file_system_that_cannot_be_told_to_write_is_written_all_the_same(tmp_path, monkeypatch):
    def refuses(number):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuses)
    write_files(tmp_path, {"a": b"1"})
    assert content(tmp_path) == {"a": b"1"}
