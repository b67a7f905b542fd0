"""Configurations that change others: each over the one it is made for, as its own first lines say, on a small world."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml

from fromage.cli.main import main
from fromage.training.configs import config_folder, find_config

ROOT = Path(__file__).resolve().parents[2]


def overlay(name):
    return yaml.safe_load(Path(find_config(name)).read_text())


@pytest.fixture
def shards(world, tmp_path, monkeypatch):
    """Options that name the small world's shards; runs/ is the test's own."""
    monkeypatch.chdir(tmp_path)
    return [
        f"--data.train_shards={world}/cc3m/train",
        "--data.max_tokens=40",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]


def fit(*words):
    """`lightning fit` with cc3m.yaml and the words' options."""
    return main(["fit", "--config=cc3m.yaml", *words])


def test_every_command_in_an_overlays_head_names_configurations_that_are_there():
    named = [re.findall(r"--config (\S+)", p.read_text()) for p in config_folder().rglob("*.yaml")]
    assert {"debug.yaml", "overfit.yaml", "lr_find.yaml", "cc3m_multinode.yaml"} <= {n for names in named for n in names}
    assert all(find_config(name) for names in named for name in names)


def test_debug_takes_a_few_steps_of_the_real_run(shards, world, capsys):
    assert fit("--config=debug.yaml", *shards, f"--data.val_shards={world}/cc3m/val") == 0
    saved = torch.load("runs/debug/version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4 and saved["hyper_parameters"]["lm"] == "toy" and saved["hyper_parameters"]["lr"] == 3e-4
    report = Path("runs/debug/version_0/report.md").read_text()
    assert "| outcome | finished |" in report and "val/t2i_r1" in report
    assert not Path("runs/cc3m").exists(), "the real run's checkpoints are not touched"


def test_overfit_sees_one_batch_until_it_is_learned(shards, monkeypatch):
    from fromage.training.module import FromageModule

    seen, losses, step = set(), [], FromageModule.training_step

    def spied(self, batch, index):
        seen.add(tuple(batch.keys))
        loss = step(self, batch, index)
        losses.append(float(loss))
        return loss

    monkeypatch.setattr(FromageModule, "training_step", spied)
    words = ["--config=debug.yaml", "--config=overfit.yaml", *shards, "--data.batch_size=8", "--data.samples_per_epoch=8"]
    assert fit(*words, "--model.lr=5e-3", "--trainer.max_steps=100") == 0
    assert len(seen) == 1 and 2 < len(losses) < 100, "it stops when the batch is learned"
    assert losses[-1] < losses[0] - 1


def test_the_learning_rate_finder_prints_and_draws_what_it_suggests(shards, capsys):
    words = ["--config=debug.yaml", "--config=lr_find.yaml", *shards, "--data.batch_size=16", "--trainer.max_steps=24"]
    assert fit(*words) == 0  # an epoch has 18 steps
    said = re.search(r"--model.lr (\S+), .*curve: (\S+)", capsys.readouterr().out)
    assert 1e-6 < float(said[1]) < 1
    assert said[2] == "runs/debug/version_0/lr_find.svg" and f">{said[1]}<" in Path(said[2]).read_text()
    assert not list(Path().rglob("*.ckpt"))


# --- several machines -----------------------------------------------------------------------------------------------


def test_machines_share_the_papers_batch():
    config = overlay("cc3m_multinode.yaml")
    trainer, data = config["trainer"], config["data"]["init_args"]
    whole = overlay("cc3m.yaml")["data"]["init_args"]["batch_size"]
    assert trainer["num_nodes"] * trainer["devices"] * data["batch_size"] == whole == 180


def test_the_job_asks_for_the_machines_that_the_configuration_names():
    script, trainer = (ROOT / "tools" / "cc3m_multinode.sbatch").read_text(), overlay("cc3m_multinode.yaml")["trainer"]
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script, re.M))
    assert int(asked["nodes"]) == trainer["num_nodes"]
    assert int(asked["ntasks-per-node"]) == int(asked["gpus-per-node"]) == trainer["devices"]
    assert "--config cc3m.yaml --config cc3m_multinode.yaml --ckpt_path last" in script


STUBS = {  # srun runs its words and passes SIGTERM on; scontrol ends the step as SLURM does, by SIGTERM; training heeds it
    "srun": 'shift; "$@" & echo $! > pid; wait $!',
    "scontrol": 'echo "$@" > requeued; kill -TERM $(cat pid)',
    "lightning": 'trap "exit 143" TERM; echo "$@" > words; [ "$LENGTH" = 0 ] && exit "$CODE"; while :; do sleep 0.05; done',
}


@pytest.fixture
def job(tmp_path):
    """Starts the batch script where srun, scontrol and lightning are stand-ins."""
    for name, text in STUBS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def start(*words, **more):
        env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"} | more
        script = ROOT / "tools" / "cc3m_multinode.sbatch"
        return subprocess.Popen(["bash", str(script), *words], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)

    return start


def test_near_its_time_limit_the_job_goes_back_into_the_queue(job, tmp_path):
    running = job("--model.k", "4", LENGTH="long")
    while not (tmp_path / "words").exists():
        time.sleep(0.02)
    running.send_signal(signal.SIGUSR1)
    said, _ = running.communicate(timeout=60)
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n" and "queue" in said
    assert running.returncode == 143
    words = (tmp_path / "words").read_text()
    assert words == "fit --config cc3m.yaml --config cc3m_multinode.yaml --ckpt_path last --model.k 4\n"


@pytest.mark.parametrize("code", [0, 2])
def test_a_job_that_ends_by_itself_ends_with_its_code(code, job, tmp_path):
    ended = job(LENGTH="0", CODE=str(code))
    ended.communicate(timeout=60)
    assert ended.returncode == code and not (tmp_path / "requeued").exists()
