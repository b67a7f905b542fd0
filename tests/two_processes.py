"""A function run by two processes that are copies of one with the imports done, which saves doing these twice."""

import multiprocessing

import torch.multiprocessing as mp

IMPORTED = ["fromage.training.module", "fromage.octopus"]


def on_two_processes(function, *args):
    """function(rank, *args) in both; raises what one of them raises."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    mp.start_processes(function, args, nprocs=2, start_method="forkserver")
