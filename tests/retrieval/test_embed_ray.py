"""A Ray Data job stores what embedding in one process does; Ray runs on this machine, for all tests of the file."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from colour_tower import Model
from PIL import Image
from test_codec import encoded, make_tar

from fromage.cli.main import main
from fromage.data.image_source import ImageBatch, ImageSample, Item
from fromage.errors import UserError
from fromage.retrieval import embed_ray as ray_embed
from fromage.retrieval.embed_images import _here, embed_images
from fromage.retrieval.embed_ray import ImageSide, RayJob

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore:.*left out")


@pytest.fixture(scope="module")
def cluster():
    """Ray with two cores; its address."""
    how = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR", "object_store_memory": 2**27}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of Ray's workers, for colour_tower
        yield start(**how)
        ray.shutdown()


def start(tries=3, **how):
    """Start Ray, which gives its own processes half a minute: too little at times on a machine with much else to do."""
    try:
        return ray.init("local", num_cpus=2, **how).address_info["address"]
    except Exception as error:
        if tries == 1 or "timed out" not in str(error):
            raise
        ray.shutdown()
        return start(tries - 1, **how)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Six shards of nine images each, of which one is broken; the last shard is torn."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for n in range(6):
        members = {}
        for i in range(9):
            image = Image.fromarray(rng.integers(0, 255, (5, 4, 3), dtype=np.uint8))
            members |= {f"{i}.png": encoded(image) if i != n else b"broken", f"{i}.txt": f"é {n} {i}".encode()}
        make_tar(folder / f"{n}.tar", members)
    (folder / "5.tar").write_bytes((folder / "5.tar").read_bytes()[:-9000])
    return folder


@pytest.fixture(scope="module")
def wanted(shards, tmp_path_factory):
    """What embedding in this process stores."""
    out = tmp_path_factory.mktemp("wanted")
    embed_images(Model(), shards, out, batch_size=2)
    assert len(stored(out)) == 6
    return out


def stored(folder):
    """Name of the part -> its table."""
    return {path.name: pq.read_table(path) for path in sorted(folder.glob("*.parquet"))}


def same(folder, wanted):
    """Whether two folders hold the same rows, the same names of what is broken, and the same embeddings.json."""
    assert (folder / "embeddings.json").read_text() == (wanted / "embeddings.json").read_text()
    ours, theirs = stored(folder), stored(wanted)
    assert ours.keys() == theirs.keys()
    for name, table in ours.items():
        assert table.equals(theirs[name], check_metadata=True)


RUN = """
import sys
sys.path[:0] = {path!r}
import ray
from colour_tower import Model
from fromage.retrieval.embed_images import embed_images
from fromage.retrieval.embed_ray import RayJob
ray.init({address!r}, log_to_driver=False, logging_level="ERROR")
embed_images(Model(0.1), {shards!r}, {out!r}, batch_size=2, ray=RayJob())
"""


def test_a_killed_job_loses_and_doubles_nothing_even_if_a_worker_dies_too(cluster, shards, wanted, tmp_path):
    out, seen = tmp_path / "out", tmp_path / "seen"
    seen.mkdir()
    script = RUN.format(path=sys.path, address=cluster, shards=str(shards), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    while not list(out.glob("*.parquet")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(before) < 6

    def kill():
        while not (workers := list(seen.iterdir())):
            time.sleep(0.02)
        os.kill(int(workers[0].name), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    embed_images(Model(0.05, str(seen)), shards, out, batch_size=2, ray=RayJob(readers=2))
    killer.join()
    same(out, wanted)
    embed_images(Model(), shards, out, batch_size=2, ray=RayJob())  # nothing is left to do
    assert len(list(seen.iterdir())) == 2  # Ray began again with another one
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


def test_the_verb(shards, wanted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fromage.models.fromage.load_model", lambda path, device: Model())
    monkeypatch.setattr("fromage.processor.find_device", lambda name: name)
    jobs = []
    monkeypatch.setattr(RayJob, "embed", lambda job, model, images: jobs.append(job) or _here(model, images, 0))
    (tmp_path / "a.ckpt").touch()
    words = ["index", "embed", "--ckpt", str(tmp_path / "a.ckpt"), "--images", str(shards), "--batch-size", "2", "--out"]
    assert main([*words, str(tmp_path / "one"), "--ray"]) == 0
    assert main([*words, str(tmp_path / "two"), "--ray", "auto", "--actors", "4", "--device", "cuda", "--workers", "9"]) == 0
    assert main([*words, str(tmp_path / "three"), "--ray", "--actors", "8", "--gpus", "0.5"]) == 0
    assert main([*words, str(tmp_path / "four")]) == 0
    assert jobs == [RayJob(), RayJob("auto", 4, 1, 9), RayJob("local", 8, 0.5)]
    assert "45 embeddings" in capsys.readouterr().out
    assert stored(tmp_path / "one") == stored(wanted)


def test_what_ray_has_not_is_refused_before_the_work(cluster, shards, tmp_path):
    for job, named in ((RayJob(gpus=0.5, actors=3), "0 GPUs, not 1.5"), (RayJob(actors=2), "leave none to read")):
        with pytest.raises(UserError, match=named):
            embed_images(Model(), shards, tmp_path / "out", ray=job)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense", "there:port", "127.0.0.1:99999999"])
def test_a_cluster_that_is_away_is_noticed_at_once(address):
    with pytest.raises(UserError, match=f"ray at {address}: "):
        ray_embed._reach(address)


def test_a_ray_that_does_not_start_is_one_line(monkeypatch):
    def init(*args, **how):
        raise Exception("The current node timed out during startup.\nMore.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError, match=r"ray at local: .*timed out during startup\.\).*tries it again"):
        list(RayJob().embed(Model(), SimpleNamespace(todo=[0])))


def test_what_is_wrong_with_a_chunk_comes_through_as_it_is(monkeypatch):
    embedder = object.__new__(ray_embed.Embedder)
    embedder.model = ImageSide(Model())
    sample = ImageSample(0, Item("a"), None)
    row = ray_embed._packed(ImageBatch(0, 0, [(torch.ones(1, 3), [sample])], True, {}))

    def refuse(*args):
        raise UserError("the disk is full; make room")

    monkeypatch.setattr(ray_embed, "embed_chunk", refuse)
    job = SimpleNamespace(iter_rows=lambda: [embedder(embedder(row))])
    monkeypatch.setattr(RayJob, "_job", lambda *args: job)
    monkeypatch.setattr(RayJob, "_cluster", lambda self: nullcontext())
    with pytest.raises(UserError, match=r"^the disk is full; make room$"):
        list(RayJob().embed(Model(), SimpleNamespace(todo=[0])))


def test_the_image_side_embeds_as_the_model_does(model):
    with torch.no_grad():
        features = torch.randn(3, model.vision.width)
        assert torch.equal(ImageSide(model).embed_images(features), model.embed_images(features))


def test_without_ray_it_says_what_to_install(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.exceptions", None)
    with pytest.raises(UserError, match=r"\.\[ray\]"):
        embed_images(Model(), shards, tmp_path / "out", ray=RayJob())
