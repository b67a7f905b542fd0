import os

import pytest
from torch.utils.data import Dataset, SequentialSampler

from fromage.data.workers import WorkerLoader, init_worker
from fromage.errors import UserError


class Numbers(Dataset):
    """0 to 3; a negative limit ends the process at once, another one raises after it."""

    def __init__(self, limit=4):
        self.limit = limit

    def __len__(self):
        return 4

    def __getitem__(self, i):
        if self.limit < 0:
            os._exit(3)
        if i >= self.limit:
            raise UserError(f"{i}: too large;\nname another")
        return i


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_as_it_was_raised(workers):
    batches = iter(WorkerLoader(Numbers(2), 2, num_workers=workers, collate_fn=list))
    assert next(batches) == [0, 1]
    with pytest.raises(UserError, match=r"^2: too large;\nname another$"):
        next(batches)


def test_a_worker_that_ends_is_one_line():
    with pytest.raises(UserError, match=r"^DataLoader worker .*; make room there, or use fewer workers$"):
        list(WorkerLoader(Numbers(-1), num_workers=1))


def test_a_loader_is_built_anew_from_its_own_options():
    loader = WorkerLoader(Numbers(), 2, collate_fn=tuple)
    names = ("batch_size", "num_workers", "collate_fn", "worker_init_fn", "drop_last", "pin_memory")
    options = {name: getattr(loader, name) for name in names}  # as Lightning does, to set a sampler
    again = WorkerLoader(dataset=loader.dataset, sampler=SequentialSampler(loader.dataset), **options)
    assert loader.worker_init_fn is again.worker_init_fn is init_worker and list(again) == [(0, 1), (2, 3)]
    assert WorkerLoader(Numbers(), worker_init_fn=print).worker_init_fn is print
