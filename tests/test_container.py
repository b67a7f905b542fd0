"""The container, as far as it can be tested without docker: what it copies, installs, starts and asks for its health."""

import json
import re
import subprocess
import sys
import threading
from configparser import ConfigParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fromage.cli.main import parse
from fromage.models import gguf
from fromage.models.towers import KNOWN
from fromage.serving.routes import router

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text("utf-8")
COMMENTS = [line for line in TEXT.splitlines() if line.startswith("#")]


def steps():
    """The instructions in order: [(FROM, python:3.11-slim), ...], lines that go on joined."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(line for line in TEXT.splitlines() if line and not line.startswith("#")))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


def only(name):
    (value,) = [value for step, value in steps() if step == name]
    return value


def test_what_it_copies_is_there_and_goes_to_the_builder():
    ignore = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in ignore and "**/__pycache__" in ignore
    copied = [source for step, value in steps() if step == "COPY" for source in value.split()[:-1]]
    assert {f"!{source}" for source in copied} == {line for line in ignore if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    read = {config["metadata"]["license_files"], config["metadata"]["long_description"].removeprefix("file: ")}
    assert {*read, "setup.cfg", "pyproject.toml", "fromage", "lightning_configs"} <= set(copied)  # what a wheel is built of


def test_it_installs_extras_that_exist_by_the_pinned_versions():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    installs = re.findall(r"pip install [^;&]*", ";".join(value for step, value in steps() if step == "RUN"))
    assert len(installs) == 2 and all("--constraint constraints.txt" in each for each in installs)
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", installs[-1])
    assert set(extras.split(",")) <= set(config["options.extras_require"])
    minor = re.fullmatch(r"python:(3\.\d+)-slim", only("FROM"))[1]
    assert f"Programming Language :: Python :: {minor}" in config["metadata"]["classifiers"]


def test_what_is_fetched_or_made_once_lies_in_the_volume():
    kept = dict(word.split("=", 1) for step, value in steps() if step == "ENV" for word in value.split())
    for name in ("FROMAGE_CACHE", "HF_HOME", "XDG_STATE_HOME"):
        assert kept[name].startswith("/data/"), name
    text = (ROOT / "docs" / "tutorials" / "serve.md").read_text("utf-8")
    (name,) = re.findall(r"`docker run --rm -v fromage:/data fromage towers get ([\w.-]+)` once", text)
    extras = re.findall(r"'\.\[([\w,]+)\]'", TEXT)[-1].split(",")
    assert KNOWN[name].source.unpack is not gguf.unpack or "gguf" in extras, "what the tower needs is installed"


def test_the_index_of_pytorchs_wheels_is_a_build_argument():
    assert only("ARG") == "TORCH_INDEX=" and "--build-arg TORCH_INDEX=URL" in "".join(COMMENTS)
    (run,) = [value for step, value in steps() if step == "RUN" and "torchvision" in value]
    url = "https://wheels.example/cpu"
    for index, told in (("", "constraints.txt torch"), (url, f"--extra-index-url {url} torch")):
        env = {"TORCH_INDEX": index, "PATH": "/usr/bin:/bin"}
        done = subprocess.run(["sh", "-c", f"pip() {{ echo pip $@; }}\n{run}"], env=env, capture_output=True, text=True)
        assert done.returncode == 0 and told in done.stdout


def test_it_serves_as_a_user_without_rights_and_reads_its_documented_commands(tmp_path):
    (tmp_path / "index.json").touch()
    here = {"/index": str(tmp_path), "/photos": str(tmp_path), "8000": "0"}
    order = [step for step, _ in steps()]
    assert order.index("USER") < order.index("ENTRYPOINT") and int(only("USER")) > 0 and "USER" not in order[-3:]
    assert json.loads(only("ENTRYPOINT")) == ["fromage"]
    documented = re.findall(r"#\s+(serve .*)", TEXT)
    assert len(documented) == 1
    for words in (json.loads(only("CMD")), documented[0].split()):
        options = parse([here.get(word, word) for word in words])[1]
        assert options["host"] == "0.0.0.0"  # what is published outside is docker's to say
        assert words[words.index("--port") + 1] == only("EXPOSE")
    assert "/data" in {value.split()[-1] for step, value in steps() if step in ("WORKDIR", "RUN")}


class Health(BaseHTTPRequestHandler):
    """A server that is well, or not."""

    status = 200

    def do_GET(self):
        self.send_response(self.status if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (None, False)])
def test_its_health_check_asks_the_servers(status, healthy, monkeypatch):
    words = json.loads(only("HEALTHCHECK").partition("CMD ")[2])
    assert words[0] == "python" and f":{only('EXPOSE')}/healthz'" in words[-1]
    assert "/healthz" in {route.path for route in router.routes}
    monkeypatch.setattr(Health, "status", status)
    server = HTTPServer(("127.0.0.1", 0), Health)
    code = words[-1].replace(only("EXPOSE"), str(server.server_port))
    if status is None:
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    done = subprocess.run([sys.executable, *words[1:-1], code], capture_output=True)
    assert (done.returncode == 0) == healthy
    if status is not None:
        server.shutdown()
        server.server_close()
