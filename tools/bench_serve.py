"""Requests per second and latency of the HTTP server under load, beside one request at a time, in turns in one run.

    python tools/bench_serve.py                             # untrained toy towers
    python tools/bench_serve.py --index runs/demo/index_k4

The server is a process of its own at 127.0.0.1. A request of /search is a sentence; one of /chat is answered with 32
tokens. In each round a lone client sends its requests one after the other, then several do so at the same time. Then one
client searches for as long as the others converse. The lone client's searches are made without HTTP too, in turns, by
another process: what embeds the query and searches, and FAISS alone. From the time of a step with one row and with many
it estimates what continuous batching, where a request joins a running batch, could gain.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from http.client import HTTPConnection
from itertools import takewhile
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from fromage.generation.preset import Preset
from fromage.io import write_json

HOST, TOKENS, ROWS, FOUND = "127.0.0.1", 32, 1000, 5
WORDS = (
    ("a small", "a big", "the"),
    ("red", "green", "blue", "white"),
    ("star", "ring", "heart"),
    ("at night", "on the sand", "in snow"),
)
PATHS = ("search", "chat")
Directly = Callable[[range], dict[str, list[float]]]  # of sentences with these numbers: seconds, by what was timed


@cache
def served(index: str | None, threads: int) -> tuple[Any, Any]:
    """The model and the index, in this process."""
    import torch

    from fromage.data.image_source import Item
    from fromage.models.fromage import Fromage
    from fromage.retrieval.faiss_index import FaissIndex
    from fromage.retrieval.open_index import open_index

    torch.set_num_threads(threads)
    if index:
        return open_index(index)
    model, rows = Fromage.load(), np.random.default_rng(0).standard_normal((ROWS, 256))
    items = [Item(f"https://images.example/{i}.jpg") for i in range(ROWS)]
    return model, FaissIndex.build(rows, items, model.fingerprint())


def run_server(port: int, index: str | None, threads: int, batch_size: int) -> None:
    """What the other process does."""
    from fromage.serving.app import Capacity, serve

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # its log
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
    serve(*served(index, threads), Preset(style="plain"), HOST, port, Capacity(batch_size=batch_size))


def search_directly(index: str | None, threads: int, numbers: range) -> dict[str, list[float]]:
    """Seconds of searches without HTTP: of the query's embedding and the search, and of FAISS alone."""
    from fromage.retrieval.queries import embed_queries

    model, opened = served(index, threads)
    seconds: dict[str, list[float]] = {"embed and search": [], "FAISS": []}
    for number in numbers:
        began = time.perf_counter()
        row = embed_queries(model, [sentence(number)]).cpu().numpy()  # (1, q)
        between = time.perf_counter()
        opened.search(row, FOUND)
        ended = time.perf_counter()
        seconds["embed and search"].append(ended - began)
        seconds["FAISS"].append(ended - between)
    return seconds


@contextmanager
def running(*settings: Any) -> Iterator[int]:
    """The port of a server that is up, for as long as it is needed."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=run_server, args=(port, *settings), daemon=True)
    process.start()
    try:
        while process.is_alive():
            with suppress(OSError):
                connection = HTTPConnection(HOST, port)
                connection.request("GET", "/healthz")
                connection.getresponse().read()
                yield port
                return
            time.sleep(0.1)
        raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.join()


def time_steps(index: str | None, threads: int, rows: int, rounds: int) -> dict[str, float]:
    """Seconds until the first token of one conversation, and of `rows` in a batch; and of each further token of these."""
    from fromage.generation.generate import generate
    from fromage.generation.options import Decoding

    model, _ = served(index, threads)
    found: dict[str, list[float]] = {"one": [], "all": [], "whole": []}
    for turn in range(rounds + 1):
        for name, count, tokens in (("one", 1, 1), ("all", rows, 1), ("whole", rows, TOKENS + 1)):
            decoding = Decoding(tokens, min_new_tokens=tokens, max_images=0)
            began = time.perf_counter()
            generate(model, [[sentence(i)] for i in range(count)], decoding, batch_size=rows)
            found[name] += [time.perf_counter() - began] if turn else []
    seconds = {name: statistics.median(some) for name, some in found.items()}
    return {"one": seconds["one"], "all": seconds["all"], "token": (seconds["whole"] - seconds["all"]) / TOKENS}


def gain_of_joining(seconds: dict[str, float], rows: int, longest: int) -> float:
    """Estimated conversations per second with continuous batching over those without, where requests always wait.

    Answers have 1 to `longest` tokens, all as likely. Without it a batch lasts as long as its longest answer; with it each
    request has a first step of its own, and the batch is always full.
    """
    last = sum(1 - (n / longest) ** rows for n in range(longest))  # expected length of the longest answer
    without = (seconds["all"] + last * seconds["token"]) / rows  # seconds per conversation
    return without / (seconds["one"] + (longest + 1) / 2 * seconds["token"] / rows)


def sentence(number: int) -> str:
    """One number, one sentence."""
    rng = np.random.default_rng(number)
    return " ".join(str(rng.choice(words)) for words in WORDS)


def body(path: str, number: int) -> bytes:
    """The request with this sentence."""
    said = sentence(number)
    decoding = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "max_images": 0}
    asked = {"messages": [{"role": "user", "content": said}], "decoding": decoding}
    return json.dumps({"query": said, "k": FOUND} if path == "search" else asked).encode()


def client(port: int, path: str, numbers: Iterable[int], seconds: list[float]) -> None:
    """Send requests one after the other over one connection, and note how long each takes."""
    connection = HTTPConnection(HOST, port, timeout=120)
    connection.connect()
    for number in numbers:
        asked, began = body(path, number), time.perf_counter()
        connection.request("POST", f"/{path}", asked, {"content-type": "application/json"})
        response = connection.getresponse()
        reply = response.read()
        seconds.append(time.perf_counter() - began)
        if response.status != 200:
            raise SystemExit(f"/{path} answered {response.status}: {reply[:200]!r}")
    connection.close()


def load(port: int, path: str, clients: int, requests: int) -> tuple[float, list[float]]:
    """So many clients share so many requests: requests per second, and seconds of each."""
    seconds: list[float] = []
    shares = [range(i, requests, clients) for i in range(clients)]
    threads = [Thread(target=client, args=(port, path, share, seconds)) for share in shares]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    if len(seconds) != requests:
        raise SystemExit(f"/{path}: {requests - len(seconds)} of {requests} requests failed")
    return requests / took, seconds


def beside(port: int, clients: int, requests: int) -> dict[str, list[float]]:
    """Seconds of one client's searches, alone and while others converse, and of those conversations."""
    seconds: dict[str, list[float]] = {"alone": [], "search": [], "chat": []}
    client(port, "search", range(clients), seconds["alone"])
    others = Thread(target=lambda: seconds["chat"].extend(load(port, "chat", clients, requests)[1]))
    others.start()
    client(port, "search", takewhile(lambda _: others.is_alive(), range(clients, 10**9)), seconds["search"])
    others.join()
    return seconds


def measure(port: int, clients: int, requests: int, rounds: int, directly: Directly) -> dict[str, Any]:
    """Medians of the rounds; the first one warms up. A lone client sends a quarter of the requests.

    directly: search_directly of the same numbers, in a process of its own.
    """
    sides = {"one": (1, max(1, requests // 4)), "many": (clients, requests)}
    rates: dict[str, dict[str, list[float]]] = {path: {side: [] for side in sides} for path in PATHS}
    times: dict[str, dict[str, list[float]]] = {path: {side: [] for side in sides} for path in PATHS}
    plain: dict[str, list[float]] = {"embed and search": [], "FAISS": []}
    for turn in range(rounds + 1):
        for name, seconds in directly(range(sides["one"][1])).items():
            plain[name] += seconds if turn else []
        for path in PATHS:
            for side, (count, sent) in sides.items():
                rate, seconds = load(port, path, count, sent if turn else min(sent, 2 * count))
                if turn:
                    rates[path][side].append(rate)
                    times[path][side] += seconds
    passed = [beside(port, clients, requests) for _ in range(rounds)]
    mixed = {name: [second for each in passed for second in each[name]] for name in ("alone", "search", "chat")}
    median = {path: {side: statistics.median(rates[path][side]) for side in sides} for path in PATHS}
    return {
        **{f"speedup_{path}": round(median[path]["many"] / median[path]["one"], 2) for path in PATHS},
        "requests_per_second": {path: {side: round(rate, 1) for side, rate in median[path].items()} for path in PATHS},
        **{f"p{p}": {x: {s: _milliseconds(t, p) for s, t in times[x].items()} for x in PATHS} for p in (50, 99)},
        "beside": {name: {f"p{p}": _milliseconds(mixed[name], p) for p in (50, 99)} for name in mixed},
        "search": {
            name: {f"p{p}": _milliseconds(seconds, p, 2) for p in (50, 99)}
            for name, seconds in ({"over HTTP": times["search"]["one"]} | plain).items()
        },
        "clients": clients,
    }


def _milliseconds(seconds: list[float], percent: int, digits: int = 1) -> float:
    return round(1000 * float(np.percentile(seconds, percent)), digits)


def main(words: list[str] | None = None) -> None:
    """Read the command line, measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", help="folder of an index, whose model is served")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=160, help="of all clients together, in a round")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1, help="of the server's model")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    other = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with other, running(args.index, args.threads, args.batch_size) as port:

        def directly(numbers: range) -> dict[str, list[float]]:
            return other.submit(search_directly, args.index, args.threads, numbers).result()

        report = measure(port, args.clients, args.requests, args.rounds, directly)
        steps = other.submit(time_steps, args.index, args.threads, args.clients, args.rounds).result()
    report["continuous_batching_estimate"] = round(gain_of_joining(steps, args.clients, 2 * TOKENS), 2)
    report["steps_ms"] = {name: round(1000 * value, 2) for name, value in steps.items()}
    print(f"{'':10}{'clients':>10}{'per second':>12}{'p50 ms':>10}{'p99 ms':>10}")
    for path in PATHS:
        for side, count in (("one", 1), ("many", args.clients)):
            figures = (report[key][path][side] for key in ("requests_per_second", "p50", "p99"))
            print(f"/{path:9}{count:10}" + "{:12.1f}{:10.1f}{:10.1f}".format(*figures))
    shown = "; ".join(f"{name} p50 {each['p50']}, p99 {each['p99']}" for name, each in report["search"].items())
    print(f"ms of a search, one at a time: {shown}")
    shown = "; ".join(f"{name} p50 {each['p50']}, p99 {each['p99']}" for name, each in report["beside"].items())
    print(f"ms of searches alone, of searches while {args.clients} converse, and of these: {shown}")
    print(f"{args.clients} clients beside one: search {report['speedup_search']} x, chat {report['speedup_chat']} x")
    told = ", ".join(f"{name} {value}" for name, value in report["steps_ms"].items())
    gain = report["continuous_batching_estimate"]
    print(f"ms of a first step of one row and of all, of a token of all: {told}; continuous batching, estimated: {gain} x")
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
