"""The GPU kit on a CPU: its dry run, time limits and budget, what a cut-off run leaves, its tables and wheels."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
KIT = TOOLS / "gpu_kit.py"


@pytest.fixture
def kit(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import gpu_kit

    return gpu_kit


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import gpu_report

    return gpu_report


@pytest.fixture
def wheels(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import gpu_wheels

    return gpu_wheels


def run(kit, folder, calls, budget=30.0, limit=20.0):
    """Run some calls as the parts 1, 2 ...; returns what the file then says of each."""
    parts = {number: kit.Part(f"part {number}", "", limit, 0.1) for number in calls}
    results = kit.Results(folder, {"kit": 1}, list(calls), parts)
    kit.run_all(calls, SimpleNamespace(results={}), results, budget, parts)
    return json.loads((folder / "results.json").read_text())["parts"]


def quick(task, save):
    return {"seen": list(task.results)}


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The results of a dry run of all parts."""
    out = tmp_path_factory.mktemp("kit")
    command = [sys.executable, str(KIT), str(out), "--dry-run", "--budget", "900"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr + (out / "kit.log").read_text()[-3000:]
    assert sorted(path.name for path in out.iterdir()) == ["kit.log", "results.json"]
    return json.loads((out / "results.json").read_text())


def test_the_dry_run_does_every_part(dry):
    assert dry["dry_run"] and "--dry-run" in dry["command"] and dry["commit"]
    parts = dry["parts"]
    assert list(parts) == list("123456789") and {entry["status"] for entry in parts.values()} == {"done"}
    found = {number: entry["figures"] for number, entry in parts.items()}
    assert found["1"]["versions"]["torch"] and found["2"]["failed"] == 0 and found["2"]["skipped"] > 10
    kinds = {"reference", "fast", "stored features", "fast, compiled"}
    assert found["3"]["seconds"].keys() == found["3"]["peak_memory_bytes"].keys() == kinds
    assert found["3"]["max_rel_grad_error"] < 1e-4 and found["3"]["peak_memory_ratio"] < 0.4
    errors = found["3"]["max_rel_grad_error_bfloat16"]
    assert 0 < errors["reference"] < 0.3 and 0 < errors["fast"] < 0.3
    assert found["5"]["flop"] > 1e9 and 0.5 < found["5"]["share_of_products"] <= 1
    assert found["6"]["same_tokens"] and found["6"]["static_cache"]["same_tokens"]
    assert found["7"]["on_device"]["same_as_cpu"] == 1 and found["7"]["recall_at_10"] > 0.8
    assert found["8"]["training"]["stages"].keys() == {"1", "2", "3"} and found["8"]["answers"]["speedup_4_boxes"] > 0
    assert found["9"]["seconds"]["fast"] > 0 and found["9"]["profile"]["flop"] > 1e8


def test_the_plan_is_within_its_tolerance_of_what_the_dry_run_measured(dry):
    found = dry["parts"]["4"]["figures"]
    assert found["kinds"].keys() == {"reference", "fast", "stored features"} and found["tolerance"] == 0.15
    assert all(kind[of]["within"] for kind in found["kinds"].values() for of in ("whole", "above")), found
    assert 0 < found["worst"]["above"] < 0.15


def test_the_tables_of_a_dry_run_hold_its_figures(dry, report):
    text = report.report(dry)
    assert "None of these figures is a result" in text and "What it left, without" not in text and "| met |" not in text
    for number, entry in dry["parts"].items():
        assert f"### {number}. {entry['name']}" in text
    seconds = dry["parts"]["3"]["figures"]["seconds"]
    assert f"| {seconds['reference'] / seconds['fast']:.2f} |" in text and dry["commit"] in text


def test_a_part_that_hangs_is_stopped_with_all_that_it_started(kit, tmp_path):
    def hang(task, save):
        child = subprocess.Popen(["sleep", "60"])
        save({"child": child.pid})
        time.sleep(60)

    began = time.monotonic()
    parts = run(kit, tmp_path, {"1": hang, "2": quick}, limit=1.0)
    assert time.monotonic() - began < 20
    assert parts["1"]["status"] == "timed out" and "1 s" in parts["1"]["error"] and parts["2"]["status"] == "done"
    state = Path(f"/proc/{parts['1']['figures']['child']}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_part_that_fails_or_dies_leaves_the_others_and_its_own_figures(kit, tmp_path):
    def fail(task, save):
        save({"so far": 1})
        raise MemoryError("the card is full")

    def die(task, save):
        os.kill(os.getpid(), signal.SIGKILL)

    parts = run(kit, tmp_path, {"1": fail, "2": die, "3": quick})
    assert parts["1"]["status"] == "failed" and parts["1"]["error"] == "MemoryError: the card is full"
    assert parts["1"]["figures"] == {"so far": 1} and "fail" in parts["1"]["traceback"]
    assert parts["2"]["status"] == "failed" and "by itself" in parts["2"]["error"]
    assert parts["3"]["status"] == "done" and parts["3"]["figures"] == {"seen": ["1"]}
    assert "MemoryError" in (tmp_path / "kit.log").read_text()


def test_a_run_that_is_killed_leaves_what_it_had(kit, tmp_path):
    def slow(task, save):
        save({"half": 2, "pid": os.getpid()})
        time.sleep(60)

    if not (pid := os.fork()):
        run(kit, tmp_path, {"1": quick, "2": slow, "3": quick})
        os._exit(0)
    file, deadline = tmp_path / "results.json", time.monotonic() + 30
    while not (file.exists() and '"half"' in file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    parts = json.loads(file.read_text())["parts"]
    assert [entry["status"] for entry in parts.values()] == ["done", "running", "not reached"]
    assert parts["2"]["figures"]["half"] == 2
    os.kill(parts["2"]["figures"]["pid"], signal.SIGKILL)


def test_a_budget_is_shared_by_priority(kit):
    shares, parts = kit.shares, kit.PARTS
    assert shares(list(parts), 1e9) == {number: part.limit for number, part in parts.items()}
    tight = shares(list(parts), 480)
    assert sum(tight.values()) == pytest.approx(480) and all(tight[n] >= parts[n].least for n in parts)
    assert tight["3"] == parts["3"].limit and tight["9"] == parts["9"].least
    least = parts["1"].least + parts["3"].least + parts["4"].least
    only = shares(list(parts), least)
    assert {number for number, share in only.items() if share} == {"1", "3", "4"}
    assert kit.PRIORITY.replace("1", "") == "34265879"


def test_a_part_without_time_is_skipped_and_said_so(kit, tmp_path):
    parts = run(kit, tmp_path, {"1": quick, "2": quick}, budget=0.05)
    assert parts["1"]["status"] == parts["2"]["status"] == "skipped" and "budget" in parts["1"]["error"]


def test_parts_are_chosen_by_number_and_keep_their_order(kit, capsys):
    assert kit.options(["out", "--only", "4,3"]).only == ["3", "4"]
    for words in (["out", "--only", "3,x"], []):
        with pytest.raises(SystemExit):
            kit.options(words)
    assert "1 to 9" in capsys.readouterr().err


def test_targets_are_met_missed_or_not_measured(monkeypatch, report):
    monkeypatch.syspath_prepend(TOOLS)
    from gpu_targets import judged

    figures = {"3": {"seconds": {"fast": 0.31}, "speedup": 4.0}, "4": {"worst": {"whole": 0.15}}}
    rows = judged(figures)
    verdicts = {row["target"]: row["met"] for row in rows}
    assert verdicts["fast step at batch 180, s"] is False and verdicts["reference : fast, time of a step"] is True
    assert verdicts["from stored features, s"] is None
    assert [row["met"] for row in rows if row["found"] == 0.15] == [True]
    text = report.targets(rows)
    assert "| 0.31 | missed |" in text and "| 4 | met |" in text and "| - | not measured |" in text


def test_the_report_names_what_is_missing_and_shows_what_is_there(report, tmp_path, capsys):
    step = {
        "preset": "paper",
        "batch": 180,
        "seconds": {"reference": 1.2, "fast": 0.3},
        "peak_memory_bytes": {"reference": 2**34},
    }
    parts = {
        "2": {"name": "tests on the card", "status": "timed out", "error": "stopped after 9 s"},
        "3": {"name": "training step", "status": "running", "figures": step | {"device": "a card"}},
        "6": {"name": "generation", "status": "failed", "error": "MemoryError", "figures": {"half": 1}},
        "9": {"name": "small model", "status": "not reached"},
    }
    about = {"kit": 1, "command": "gpu_kit", "commit": "abc", "started": "today", "budget": 480, "dry_run": False}
    (file := tmp_path / "results.json").write_text(json.dumps(about | {"targets": [], "parts": parts}))
    assert report.main([str(file)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("## a card") and "`gpu_kit`, commit abc, today" in text and "dry run" not in text
    assert "**timed out**: stopped after 9 s" in text and "**cut off while it ran**" in text
    assert "| fast | 0.3 | 600.0 | 4.00 | - | - |" in text and "| reference | 1.2 | 150.0 | 1.00 | 16.00 | 100.0 % |" in text
    assert '"half": 1' in text and "**not reached**" in text
    (tmp_path / "other.json").write_text("[]")
    assert report.main([str(tmp_path / "other.json")]) == 2


def pip(sizes, seen):
    """Stands for pip: writes files of these sizes in bytes."""

    def download(command):
        seen.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(exist_ok=True)
        for name, size in sizes.items():
            (folder / name).write_bytes(b"0" * size)
        return SimpleNamespace(returncode=0)

    return download


def test_wheels_are_asked_for_by_version_for_a_bare_machine(wheels, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(wheels.subprocess, "run", pip({"a.whl": 2**20, "b.whl": 2**19}, seen))
    assert wheels.collect(tmp_path / "wheels") == 0
    (command,) = seen
    text = " ".join(command)
    assert "--no-deps" in command and "--only-binary=:all:" in command and "--python-version 3.12" in text
    assert "--platform manylinux2014_x86_64" in text and "index" not in text
    assert [word.partition("==")[0] for word in command if "==" in word] == list(wheels.CARRIED.values())
    assert "1.50 MiB  of 64" in capsys.readouterr().out


def test_too_many_wheels_and_a_pip_that_fails_are_said(wheels, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wheels, "MOST", 2**20)
    monkeypatch.setattr(wheels.subprocess, "run", pip({"a.whl": 2**20 + 1}, []))
    assert wheels.collect(tmp_path) == 1 and "too much to carry" in capsys.readouterr().err
    monkeypatch.setattr(wheels.subprocess, "run", lambda command: SimpleNamespace(returncode=1))
    assert wheels.collect(tmp_path) == 1 and "pip could not" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no-such-package"):
        wheels.pinned(["no-such-package"])


def test_unpacked_wheels_can_be_imported(wheels, tmp_path):
    assert wheels.unpacked(None) == []
    with pytest.raises(SystemExit, match="no wheel"):
        wheels.unpacked(tmp_path)
    with zipfile.ZipFile(tmp_path / "carried-1-py3-none-any.whl", "w") as archive:
        archive.writestr("carried_module.py", "VALUE = 7")
    (site,) = wheels.unpacked(tmp_path)
    asked = subprocess.run([sys.executable, "-c", "import carried_module as c; print(c.VALUE)"], capture_output=True,
                           text=True, env=os.environ | {"PYTHONPATH": site})  # fmt: skip
    assert asked.stdout.strip() == "7"


def imports(file):
    """Names of the packages that a file imports when it is imported itself."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def test_every_package_the_kit_imports_is_carried_or_there(wheels, dry):
    code = "import sys; sys.path.insert(0, 'tools'); import gpu_parts, fromage.retrieval.faiss_index, fromage.octopus.lora; "
    code += "print('\\n'.join(str(m.__file__) for m in list(sys.modules.values()) if getattr(m, '__file__', None)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    ours = {Path(line) for line in loaded if line.startswith((str(ROOT / "fromage"), str(TOOLS)))}
    assert len(ours) > 30
    named = {name for file in ours for name in imports(file)}
    own = {file.stem for file in TOOLS.glob("*.py")} | {"fromage"}
    assert named - own - set(sys.stdlib_module_names) <= wheels.PRESENT | wheels.CARRIED.keys()


def test_a_trace_is_summed_up(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    from profile_step import STEP, Event, summarise

    events = [
        Event(STEP, False, 100, 1000, part=True),
        Event("captioning", False, 105, 30, part=True),
        Event("captioning", True, 300, 800, part=True),
        Event("cudaStreamSynchronize", False, 50, 5),  # before the step: the profiler's own
        Event("cudaLaunchKernel", False, 110, 5),
        Event("cudaLaunchKernelExC", False, 120, 5),
        Event("cudaDeviceSynchronize", False, 130, 5),
        Event("cudaDeviceSynchronize", False, 1200, 5),
        Event("sm90_xmma_gemm_bf16", True, 300, 600),
        Event("flash_fwd_kernel_cutlass", True, 900, 200),
        Event("Memcpy HtoD", True, 950, 400),
        Event("elementwise", True, 1100, 200),
    ]
    found = summarise(events, 2e-3)
    assert found["launches"] == 2 and found["waits"] == 1 and found["parts"] == {"captioning": 8e-4}
    assert found["share_of_products"] == pytest.approx(0.6) and found["share_of_attention"] == pytest.approx(0.2)
    assert found["busy_share"] == pytest.approx(0.5) and found["launch_bound"] is True
    assert found["kernels"][0]["name"] == "sm90_xmma_gemm_bf16"
    assert summarise(events, 1.1e-3)["launch_bound"] is False


def test_a_machine_that_lacks_a_package_is_told_which(tmp_path):
    (tmp_path / "open_clip.py").write_text("raise ImportError('no open_clip here')")
    command = [sys.executable, str(KIT), str(tmp_path / "out"), "--dry-run", "--only", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]["1"]
    assert done.returncode and entry["status"] == "failed" and "no open_clip here" in entry["error"]
