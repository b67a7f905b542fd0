"""The order of training rows: epochs differ, devices share no row, and a run goes on where it stood."""

from types import SimpleNamespace

from fromage.octopus.sampler import ResumableSampler


def test_each_epoch_is_new_divided_among_devices_and_taken_up_where_it_stood():
    def sampler(rank, begin=0):
        return ResumableSampler(range(1003), SimpleNamespace(world_size=2, global_rank=rank), 5, lambda: begin)

    mine, theirs = sampler(0), sampler(1)
    first, other = list(mine), list(theirs)
    assert len(first) == len(other) == 501 and not set(first) & set(other)
    assert list(sampler(0, begin=12)) == first[12:]
    mine.set_epoch(1)
    assert list(mine) != first
