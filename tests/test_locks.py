"""A folder belongs to one writer at a time: other processes and threads are refused, and a kill frees it."""

import multiprocessing
import os
import signal
import threading

import pytest

from fromage import locks
from fromage.errors import UserError
from fromage.io import whole_folder
from fromage.locks import held

fork = multiprocessing.get_context("fork")
fresh = multiprocessing.get_context("spawn")  # what other tests have loaded may not bear a fork


def keep(folder, beside, tell):
    with held(folder, beside):
        tell.send(os.getpid())
        signal.pause()


@pytest.fixture(params=[False, True], ids=["inside", "beside"])
def holder(request, tmp_path):
    """A process that holds tmp_path / 'out', and where its lock lies."""
    told, tell = fresh.Pipe(duplex=False)
    process = fresh.Process(target=keep, args=(tmp_path / "out", request.param, tell), daemon=True)
    process.start()
    assert told.recv() == process.pid
    yield process, request.param
    process.kill()
    process.join()


def test_a_second_process_is_refused_by_folder_and_pid_and_a_kill_frees_the_folder(holder, tmp_path):
    process, beside = holder
    for folder in (tmp_path / "out", str(tmp_path / "." / "out")):
        with pytest.raises(UserError, match=rf"out: is in use by process {process.pid}") as refused, held(folder, beside):
            pass
        assert len(str(refused.value).splitlines()) == 1
    process.kill()
    process.join()
    with held(tmp_path / "out", beside):
        pass
    left = [path for path in tmp_path.rglob("*") if path.name.endswith("lock")]
    assert left == []


def test_blocks_of_one_thread_may_be_nested_and_another_thread_is_refused(tmp_path):
    said = []

    def other():
        try:
            with held(tmp_path):
                said.append("held")
        except UserError as error:
            said.append(str(error))

    def run():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with held(tmp_path):
        with held(tmp_path):
            run()
        run()  # still held after the inner block
    run()
    assert [f"in use by process {os.getpid()}" in text for text in said] == [True, True, False] and said[2] == "held"


def parent(folder, ready, go):
    with held(folder):
        fork.Process(target=linger, args=(ready, go)).start()
        os.kill(os.getpid(), signal.SIGKILL)


def linger(ready, go):
    ready.send(1)
    go.recv()


def test_a_worker_that_outlives_its_parent_holds_nothing(tmp_path):
    """Data loaders fork: the folder is free as soon as the process that wrote it has ended."""
    ready, tell = fresh.Pipe(duplex=False)
    wait, go = fresh.Pipe(duplex=False)
    process = fresh.Process(target=parent, args=(tmp_path, tell, wait))
    process.start()
    assert ready.poll(60)
    process.join()
    with held(tmp_path):
        pass
    go.send(1)


def count(folder, barrier, tell):
    mine = 0
    barrier.wait()
    for _ in range(300):
        try:
            with held(folder):
                path = folder / "count"
                number = int(path.read_text())
                path.write_text(str(number + 1))
                mine += 1
        except UserError:
            pass
    tell.send(mine)


def test_no_two_processes_are_ever_in_it_at_once(tmp_path):
    (tmp_path / "count").write_text("0")
    barrier, (told, tell) = fresh.Barrier(3), fresh.Pipe(duplex=False)
    processes = [fresh.Process(target=count, args=(tmp_path, barrier, tell)) for _ in range(3)]
    for process in processes:
        process.start()
    total = sum(told.recv() for _ in processes)
    for process in processes:
        process.join()
    assert int((tmp_path / "count").read_text()) == total > 0


def test_a_file_system_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", none)
    with held(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()


def test_a_folder_that_another_process_replaces_is_refused_and_stays(tmp_path, other_writer):
    with whole_folder(tmp_path / "out") as new:
        (new / "old").touch()
    pid = other_writer(tmp_path / "out", beside=True)
    with pytest.raises(UserError, match=f"process {pid}"), whole_folder(tmp_path / "out"):
        pytest.fail("entered")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]


def test_a_link_and_its_folder_have_one_lock(tmp_path, other_writer):
    (tmp_path / "real").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "out").symlink_to(tmp_path / "real")
    pid = other_writer(tmp_path / "links" / "out", beside=True)
    for folder in (tmp_path / "real", tmp_path / "links" / "out"):
        with pytest.raises(UserError, match=rf"{folder}: is in use by process {pid}"), held(folder, beside=True):
            pytest.fail("entered")


def test_a_folder_that_another_thread_gives_up_meanwhile_is_locked_anew(tmp_path, monkeypatch):
    class GivenUp(dict):
        """Another thread holds the folder until this one asks whose it is."""

        def setdefault(self, key, mine):
            self.pop(key, None)
            return super().setdefault(key, mine)

    table = GivenUp({(os.getpid(), tmp_path / "out" / locks.LOCK): -1})
    monkeypatch.setattr(locks, "_held", table)
    with held(tmp_path / "out"):
        assert (tmp_path / "out" / locks.LOCK).exists()
    assert not table
