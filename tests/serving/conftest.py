"""The application over a fresh model and an index of six colours, and its client."""

import pytest
from fastapi.testclient import TestClient

from fromage.generation.preset import Preset
from fromage.serving.app import create_app
from fromage.serving.batching import Capacity


@pytest.fixture(scope="module")
def app(model, index):
    return create_app(model, index, Preset(style="plain"), Capacity(timeout=20))


@pytest.fixture
def client(app):
    with TestClient(app) as client:
        yield client
