"""Notebooks: each runs from its first cell to its last, offline and on a small toy model, and is kept without outputs."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("ipywidgets")

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """The tour of `make demo` through a smaller world, with three steps of training."""
    from fromage.apps import toy_demo
    from fromage.toy.world import make_world

    small = partial(make_world, stories=20, dialogues=20, refs=1, progress=False)
    out = tmp_path_factory.mktemp("notebooks") / "demo"
    few = ["--trainer.max_steps=3", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=1"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside other work, many threads wait for each other in so small a model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_demo, "make_world", small)
        options = [*few, "--data.batch_size=32", "--trainer.enable_progress_bar=false"]
        toy_demo.demo(out, pairs=100, scenes=30, options=options)
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def octopus(world, tmp_path_factory):
    """The toy Octopus and its counterpart after two steps, on the small world."""
    from fromage.apps import octopus_demo

    out = tmp_path_factory.mktemp("octopus")
    (out / "world").symlink_to(world)
    few = ["--model.init=null", "--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--data.batch_size=4"]
    for name, configs in (("stage3", octopus_demo.STAGES[2:]), ("sequential", octopus_demo.SEQUENTIAL)):
        octopus_demo.train_once(out, name, configs, [*few, "--trainer.enable_progress_bar=false"])
    return out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_it_is_kept_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and set(notebook.metadata) == {"kernelspec", "language_info"}
    about = notebook.cells[0]
    assert about.cell_type == "markdown" and about.source.startswith("# ") and "\n\nFor " in about.source, "what it is for"
    for cell in notebook.cells:
        assert cell.source.strip()
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            assert all(len(line) <= 125 for line in cell.source.splitlines())
            compile(cell.source, path.name, "exec")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_it_runs(path, tour, octopus, tmp_path, monkeypatch):
    folders = {"FROMAGE_DEMO": tour, "FROMAGE_OCTOPUS": octopus, "FROMAGE_WORK": tmp_path}
    for name, value in (folders | {"FROMAGE_SAMPLE": 12, "HF_HUB_OFFLINE": 1}).items():
        monkeypatch.setenv(name, str(value))
    for name in ("FROMAGE_FULL_SIZE", "FROMAGE_IMAGES", "FROMAGE_CKPT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    kinds = {kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})}
    assert kinds & {"image/png", "image/svg+xml"}, "a notebook shows something"


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 6
