"""The workflows: what they run exists, and what publishes has no more rights than it needs."""

import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
CONFIG = ConfigParser()
CONFIG.read(ROOT / "setup.cfg")


def commands(workflow):
    return [step["run"] for job in WORKFLOWS[workflow]["jobs"].values() for step in job.get("steps", []) if "run" in step]


def test_there_is_one_for_tests_and_one_for_publishing():
    assert set(WORKFLOWS) == {"tests", "publish"}
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            if "uses" in job:
                assert (ROOT / job["uses"]).is_file() and "workflow_call" in WORKFLOWS[Path(job["uses"]).stem][True]
                continue
            assert job["timeout-minutes"] <= 60
            assert all(re.fullmatch(r"[\w-]+/[\w-]+@[\w/.]+", step["uses"]) for step in job["steps"] if "uses" in step)


def test_the_tests_are_those_of_ci_on_each_version_that_is_named():
    named = re.findall(r"Python :: (3\.\d+)", CONFIG["metadata"]["classifiers"])
    job = WORKFLOWS["tests"]["jobs"]["tests"]
    assert job["strategy"]["matrix"]["python"] == named and len(named) == 2
    (setup,) = [step["with"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert setup["cache"] == "pip" and all((ROOT / name).is_file() for name in setup["cache-dependency-path"].split())
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    asked = {word for run in commands("tests") for word in re.findall(r"^make (\w+)", run)}
    in_ci = set(re.findall(r"make (\w+)", (ROOT / ".ci" / "run").read_text("utf-8")))
    assert {"test", "lint", "types", "container"} == asked == in_ci <= targets
    switches = {word for run in commands("tests") for word in re.findall(r"FROMAGE_\w+", run)}
    assert switches and all(name in (ROOT / "tests" / "test_packaging.py").read_text("utf-8") for name in switches)


def test_a_tag_is_published_without_a_stored_token():
    publish = WORKFLOWS["publish"]
    assert publish[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads the key `on` as true
    assert (
        publish["jobs"]["publish"]["permissions"] == {"id-token": "write"} and "permissions" not in publish["jobs"]["build"]
    )
    assert publish["jobs"]["build"]["needs"] == "tests" and publish["jobs"]["publish"]["needs"] == "build"
    assert publish["jobs"]["publish"]["environment"]
    assert "secrets." not in (ROOT / ".github" / "workflows" / "publish.yml").read_text("utf-8")
    assert "python -m build" in commands("publish")


@pytest.mark.parametrize(
    ("tag", "published"), [("v{}", True), ("{}", True), ("v{}.1", False), ("v9.9.9", False), ("v", False)]
)
def test_a_tag_of_another_version_is_not_published(tag, published):
    (check,) = [run for run in commands("publish") if "GITHUB_REF_NAME" in run]
    named = tag.format(CONFIG["metadata"]["version"])
    done = subprocess.run(["bash", "-c", check], cwd=ROOT, env={"GITHUB_REF_NAME": named, "PATH": "/usr/bin:/bin"})
    assert (done.returncode == 0) == published
