"""For the tests of the HTTP server: an application over a fresh model and an index of six colours, and its client.

PYTEST_DONT_REWRITE: it is imported before it is registered.
"""

import base64

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from fromage.embed_pictures import embed_opened
from fromage.index import ImageIndex
from fromage.model import Fromage
from fromage.picture_source import Item
from fromage.serving.app import create_app
from fromage.serving.batching import Limits

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
SAY = {"messages": [{"role": "user", "content": "a red star"}]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Fromage.load(k=2, q=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("pictures")
    for colour in COLOURS:
        Image.new("RGB", (64, 64), colour).save(out / f"{colour}.png")
    return out


@pytest.fixture(scope="module")
def index(model, folder):
    paths = sorted(folder.glob("*.png"))
    rows = embed_opened(model, [Image.open(path) for path in paths])
    return ImageIndex.build(rows, [Item(str(path), path.stem) for path in paths], model.fingerprint())


@pytest.fixture(scope="module")
def app(model, index):
    return create_app(model, index, "plain", Limits(timeout=20))


@pytest.fixture
def client(app):
    with TestClient(app) as client:
        yield client


def sent(path):
    return {"type": "picture", "data": base64.b64encode(path.read_bytes()).decode()}


def captions(reply):
    assert reply.status_code == 200, reply.text
    return [hit["caption"] for hit in reply.json()["hits"]]
