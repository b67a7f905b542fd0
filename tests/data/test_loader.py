"""Going on in the middle of an epoch: what comes is what would have come."""

import itertools
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_datamodule import CC3M, captioned, keys, module, shards

from fromage.data.loader import TrainLoader
from fromage.errors import UserError
from fromage.octopus import OctopusData

EVERY = [(workers, sizes) for workers in (0, 2) for sizes in (True, False)]


@pytest.fixture
def data(tmp_path):
    """Seven shards of five, a fifth of them undecodable, one torn, in batches of three."""
    folder = shards(tmp_path / "s", n=35, per_shard=5, bad=range(0, 35, 5))
    torn = tmp_path / "s" / "00004.tar"
    torn.write_bytes(torn.read_bytes()[:5000])

    def make(workers=0, sizes=True, **named):
        if not sizes:
            (tmp_path / "s" / "sizes.json").unlink(missing_ok=True)
        return module(folder, **{"batch_size": 3, "workers": workers, "max_broken": 0.9, "shuffle": 7, **named})

    return make


def rows(batches):
    return [batch.keys for batch in batches]


@pytest.mark.parametrize(("workers", "sizes"), EVERY)
def test_the_rest_of_an_epoch_is_exactly_what_was_left_and_so_is_the_next(data, workers, sizes):
    whole = data(workers, sizes).train_dataloader()
    first, second = rows(whole), rows(whole)
    assert len(first) > 6 and first != second
    for stop in (1, 6, len(first)):
        begun = data(workers, sizes).train_dataloader()
        assert rows(itertools.islice(begun, stop)) == first[:stop]
        taken_up = data(workers, sizes).train_dataloader()
        taken_up.load_state_dict(begun.state_dict())
        rest = rows(taken_up)
        if sizes and stop == len(first):  # known to be the end: the next epoch comes
            assert rest == second
        else:
            assert rest == first[stop:]
            assert rows(taken_up) == second


def test_a_run_that_stops_before_the_first_batch_of_an_epoch_goes_on_with_it(data):
    whole = data(2).train_dataloader()
    first, second = rows(whole), rows(whole)
    untouched = data(2).train_dataloader()
    ended = data(2).train_dataloader()
    ended.loop = SimpleNamespace(batch_idx=-1, max_batches=len(first))  # as Lightning has it where the next epoch begins
    given = rows(itertools.islice(ended, len(first)))  # of a known length it asks for no more
    assert given == first and not ended.ended
    begun = data(2).train_dataloader()
    rows(itertools.islice(begun, 2))
    resumed = data(2).train_dataloader()
    resumed.load_state_dict(begun.state_dict())
    for stopped, rest in ((untouched, first), (ended, second), (resumed, first[2:])):
        taken_up = data(2).train_dataloader()
        taken_up.load_state_dict(stopped.state_dict())
        assert rows(taken_up) == rest


def test_resuming_twice_is_as_good_as_once(data):
    first = rows(data(2).train_dataloader())
    seen = []
    state = None
    for steps in (3, 2, 100):
        loader = data(2).train_dataloader()
        if state:
            loader.load_state_dict(state)
        seen += rows(itertools.islice(loader, steps))
        state = loader.state_dict()
    assert seen == first


def test_the_share_of_broken_samples_is_judged_as_without_a_break(tmp_path):
    folder = shards(tmp_path / "s", n=200, per_shard=100, bad=range(100, 120))  # 10 % broken, the second half 20 %
    whole = module(folder, batch_size=10, shuffle=0, max_broken=0.17).train_dataloader()
    assert len(rows(itertools.islice(whole, 9))) == 9
    taken_up = module(folder, batch_size=10, shuffle=0, max_broken=0.17).train_dataloader()
    taken_up.load_state_dict(whole.state_dict())
    assert len(rows(taken_up)) == 11  # with the first 90 forgotten, 20 of 110 would stop it


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_goes_on_draws_the_captions_that_were_left(tmp_path, workers):
    folder = captioned(tmp_path / "s", n=30)

    def loader():
        return module(folder, batch_size=3, workers=workers, shuffle=7).train_dataloader()

    def texts(batches):
        return [batch.captions for batch in batches]

    whole = loader()
    epochs = [texts(whole) for _ in range(3)]
    begun, taken_up = loader(), loader()
    texts(begun)
    assert texts(itertools.islice(begun, 4)) == epochs[1][:4]
    taken_up.load_state_dict(begun.state_dict())
    assert [texts(taken_up), texts(taken_up)] == [epochs[1][4:], epochs[2]]


def test_a_checkpoint_written_before_there_were_several_captions_goes_on(data):
    begun, taken_up = data().train_dataloader(), data().train_dataloader()
    first = rows(itertools.islice(begun, 2))
    state = begun.state_dict()
    del state["layout"]["data.captions_per_image"]
    taken_up.load_state_dict(state)
    assert first + rows(taken_up) == rows(data().train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_requests_are_the_same_after_resuming(data, workers):
    def loader(share=0.5):
        return data(workers, requests=share).train_dataloader()

    def read(batches):
        return [batch.queries.captions for batch in batches]

    whole = read(loader())
    begun, taken_up = loader(), loader()
    first = read(itertools.islice(begun, 3))
    taken_up.load_state_dict(begun.state_dict())
    assert first + read(taken_up) == whole != read(loader(0.0))
    state = begun.state_dict()
    with pytest.raises(UserError, match=r"data\.requests 0\.5 \(now 0\.0\)"):
        loader(0.0).load_state_dict(state)
    del state["layout"]["data.requests"]  # as written before there was the option
    loader(0.0).load_state_dict(state)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"captions_per_image": 2}, r"data\.captions_per_image None \(now 2\)"),
        ({"workers": 1}, r"data\.workers 2 \(now 1\)"),
        ({"batch_size": 4}, r"data\.batch_size 3 \(now 4\)"),
        ({"shuffle": 0}, r"data\.shuffle 7 \(now 0\)"),
        ({"seed": 9}, r"data\.seed 0 \(now 9\)"),
        ({"samples_per_epoch": 30}, r"batches per epoch 11 \(now 10\)"),
        ({"sizes": False}, r"data\.train_shards 7 shards"),
    ],
)
def test_an_epoch_dealt_out_otherwise_is_refused_or_begun_anew(data, other, name):
    begun = data(2).train_dataloader()
    next(iter(begun))
    state = begun.state_dict()
    with pytest.raises(UserError, match=f"middle of an epoch with.*{name}.*exact_resume false"):
        data(**{"workers": 2, **other}).train_dataloader().load_state_dict(state)
    again = data(**{"workers": 2, **other}, exact_resume=False).train_dataloader()
    with pytest.warns(UserWarning, match="begins again"):
        again.load_state_dict(state)
    assert rows(again) == rows(data(**{"workers": 2, **other}).train_dataloader())


def test_another_number_of_devices_is_refused(data, monkeypatch):
    begun = data().train_dataloader()
    next(iter(begun))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"devices 1 \(now 2\)"):
        data().train_dataloader().load_state_dict(begun.state_dict())


def test_every_device_goes_on_from_its_own_place(data, monkeypatch):
    def on(rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        return data().train_dataloader()

    whole = [rows(on(rank)) for rank in range(2)]
    begun = [on(rank) for rank in range(2)]
    assert [rows(itertools.islice(loader, 2)) for loader in begun] == [device[:2] for device in whole]
    places = [loader.state_dict()["devices"][0] for loader in begun]
    assert places[0]["places"] != places[1]["places"]  # for want of whole samples one took more than the other
    with monkeypatch.context() as group:
        group.setattr("torch.distributed.is_initialized", lambda: True)
        group.setattr("torch.distributed.all_gather_object", lambda out, mine: out.__setitem__(slice(None), places))
        state = begun[0].state_dict()
    for rank in range(2):
        taken_up = on(rank)
        taken_up.load_state_dict(state)
        assert rows(taken_up) == whole[rank][2:]


def test_at_the_end_of_an_epoch_anything_may_change(data):
    begun = data(2).train_dataloader()
    rows(begun)
    other = data(0, batch_size=5).train_dataloader()
    other.load_state_dict(begun.state_dict())
    assert other.epoch == 1


def test_a_state_of_an_earlier_version_is_refused(data):
    with pytest.raises(UserError, match=r"data.batch_size unknown \(now 3\)"):
        data().train_dataloader().load_state_dict({"epoch": 0, "given": 4})


def test_a_loop_that_reads_ahead_is_asked_how_far_it_came(data):
    class Loop:
        batch_idx, max_batches = -1, float("inf")

    loop, source = Loop(), data().train_dataloader()
    loader = TrainLoader(source.dataset, loop=loop)
    given = iter(loader)
    first = [next(given).keys, next(given).keys]
    loop.batch_idx = 0  # trained on one, and holds another
    taken_up = data().train_dataloader()
    taken_up.load_state_dict(loader.state_dict())
    assert next(iter(taken_up)).keys == first[1]
    loop.max_batches = 1  # as limit_train_batches has it: the epoch is over
    taken_up.load_state_dict(loader.state_dict())
    assert taken_up.epoch == 1


def test_keys_of_a_plain_run(data):
    assert isinstance(data(), CC3M) and len(keys(data().train_dataloader())) == 33


ORPHANS = """
import os, sys, time, torch
from fromage.data.workers import WorkerLoader

class Heavy(torch.utils.data.Dataset):
    def __len__(self): return 1000
    def __getitem__(self, i): return os.getpid(), "x" * 1_000_000

batches = iter(WorkerLoader(Heavy(), None, num_workers=2))
print(next(batches)[0], next(batches)[0], flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_workers_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(set(workers)) == 2 and all(Path(f"/proc/{pid}").exists() for pid in workers)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 60
    while any(running(pid) for pid in workers):
        assert time.monotonic() < end, "they outlive it"
        time.sleep(0.05)


def running(pid):
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_run_without_validation_is_not_warned_of_it():
    quiet = OctopusData()
    quiet.examples["val"] = []
    for loaders in (CC3M("shards").val_dataloader, quiet.val_dataloader):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            assert loaders() == []
            warnings.warn(
                "Total length of `list` across ranks is zero. Please make sure this was your intention.", stacklevel=1
            )
        assert not heard
