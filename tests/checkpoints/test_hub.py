"""Whether the model hub is within reach, at the port that its address has."""

import socket

import pytest
from huggingface_hub import constants

from fromage.checkpoints import hub


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)


def look(monkeypatch, endpoint):
    """Look for the hub at an address, which is done once in a process; whether the rest of it is offline."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    hub.stay_offline_without_hub.__wrapped__()
    return constants.HF_HUB_OFFLINE


def test_a_mirror_on_a_port_of_its_own_is_used_while_it_answers(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as mirror:
        address = "http://{}:{}".format(*mirror.getsockname())
        assert not look(monkeypatch, address)
    assert look(monkeypatch, address)


@pytest.mark.parametrize(
    ("endpoint", "asked"),
    [
        ("https://huggingface.co", ("huggingface.co", 443)),
        ("http://mirror.example", ("mirror.example", 80)),
        ("https://mirror.example:8443/hub", ("mirror.example", 8443)),
    ],
)
def test_without_a_port_it_is_that_of_the_scheme(endpoint, asked, online, monkeypatch):
    seen = []

    def connect(address, timeout):
        seen.append(address)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", connect)
    assert look(monkeypatch, endpoint) and seen == [asked]


def test_an_address_without_a_port_that_can_be_is_out_of_reach(online, monkeypatch):
    assert look(monkeypatch, "http://mirror.example:port")
