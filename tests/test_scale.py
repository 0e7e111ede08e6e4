"""Trainings on a cluster: the Slurm script and submitit's arrays, with small programs in the place of Slurm's."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from functools import wraps
from importlib import import_module
from pathlib import Path

import pytest
import submitit
from processes import Processes, needs_fork, run_two
from submitit.core.submission import process_job
from submitit.core.utils import DelayedSubmission
from test_resume import FLAGS, at_step, contents, kill_all, saved_step, tiny, wait_for_checkpoint, whole
from test_train import TinyKN

from experiments import submit as submission
from experiments.__main__ import COMMANDS, main
from experiments.submit import Job, submit
from experiments.train import train
from knport.errors import KNPortError

ROOT = Path(__file__).parents[1]
SRUN = """#!/bin/bash
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
for task in "${tasks[@]}"; do while kill -0 $task 2>/dev/null; do wait $task; ended=$?; done; done
exit $ended
"""
SCONTROL = """#!/bin/bash
case $1 in show) echo localhost;; requeue) echo "$2" >> "$REQUEUED";; esac
"""
SBATCH = """#!/bin/bash
cp "${@: -1}" "$SUBMITTED"
echo Submitted batch job 4242
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Slurm's commands first in the path: a node that is this machine, with two processes.

    KNPORT_TEST_NODES=2 makes it two nodes of one. That is not what CI runs: two launchers on one machine have been seen
    to wait for each other for good.
    """
    nodes = int(os.environ.get("KNPORT_TEST_NODES", "1"))
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    settings = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    settings |= {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "here"}
    settings |= {"SLURM_JOB_NUM_NODES": str(nodes), "PROCESSES": str(2 // nodes)}
    settings |= {"REQUEUED": str(tmp_path / "requeued"), "SUBMITTED": str(tmp_path / "submitted")}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    return tmp_path


@pytest.mark.slow
@needs_fork
def test_the_slurm_script(cluster):
    """Its processes meet; before the time limit the training saves, and the job goes back into the queue."""
    flags = [part for pair in FLAGS.items() for part in pair]
    script = str(ROOT / "experiments" / "slurm" / "train.sbatch")
    started = subprocess.Popen(
        ["bash", script, "digits", *flags, "--run-dir", str(cluster / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_checkpoint(started, cluster / "run")
        started.send_signal(signal.SIGUSR1)
        said = started.communicate(timeout=120)[0]
    finally:
        kill_all(started)
    assert started.returncode == 0, said
    assert "stopped at step" in said
    assert (cluster / "requeued").read_text() == "4242\n"
    assert json.loads((cluster / "run" / "run.json").read_text())["environment"]["processes"] == 2
    run_two(lambda: whole(cluster / "run"), cluster / "processes")  # the same training, here
    run_two(lambda: whole(cluster / "whole"), cluster / "processes")
    assert contents(cluster / "run") == contents(cluster / "whole")


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False)])
def test_the_slurm_script_passes_on_how_training_ended(cluster, monkeypatch, status, requeued):
    """What failed by itself would fail again: it does not go back into the queue."""
    (cluster / "programs" / "srun").write_text(f'#!/bin/bash\necho "$@" > "$SUBMITTED"\nexit {status}\n')
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("PROCESSES", "1")
    script = ROOT / "experiments" / "slurm" / "train.sbatch"
    done = subprocess.run(["bash", script, "digits", "--seed", "3"], timeout=60)
    assert done.returncode == status
    assert (cluster / "requeued").exists() == requeued
    words = (cluster / "submitted").read_text()
    assert "--num_machines 2 --num_processes 2 --multi_gpu --rdzv_backend c10d --main_process_ip localhost" in words
    assert words.rstrip().endswith("-m experiments train digits --seed 3 --processes 2")


def test_the_slurm_script_says_how_it_is_used(cluster):
    script = ROOT / "experiments" / "slurm" / "train.sbatch"
    done = subprocess.run(["bash", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr


def test_the_commands_of_the_page(monkeypatch):
    """Every command of docs/scale.md is understood, down to its last flag."""
    asked = []
    for name in ("train", "submit", "search_lr", "validate"):
        module = import_module(f"experiments.{name}")
        monkeypatch.setattr(module, name, wraps(getattr(module, name))(lambda *a, name=name, **k: asked.append(name)))
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").replace("\\\n", " ")
    for words in re.findall(r"-m experiments (.+)", page) + re.findall(r"train\.sbatch (.+)", page):
        line = words if words.split()[0] in COMMANDS else f"train {words}"
        assert main([word for word in shlex.split(line) if word != "..."]) in (0, None), line
    assert set(asked) == {"train", "submit", "search_lr", "validate"}


# Arrays


GRID = {"models": ["cifar_resnet8"], "norms": ["original", "group"], "batch_sizes": [16], "seeds": [0, 1]}
SMALL = {"steps": [2], "override": ["train_images=64", "test_images=50"]}


@pytest.fixture
def kn_net(monkeypatch):
    monkeypatch.setattr("experiments.train.build_for", lambda run, network: TinyKN(network["num_classes"]))


def test_an_array_of_what_has_not_finished(cluster, kn_net, capsys):
    out = cluster / "runs"
    assert submit("digits", **GRID, **SMALL, out=str(out), dry_run=True) == []
    assert "4 runs, 0 of them finished; to submit: 4" in capsys.readouterr().out
    assert not out.exists()
    some = GRID | {"norms": ["group"], "seeds": [1]}
    submit("digits", **some, **SMALL, out=str(out), gpus=0, slurm=["partition=tiny"])
    (pickle,) = (out / "jobs").glob("*_submitted.pkl")
    train(DelayedSubmission.load(pickle).function.run, quiet=True)  # what the machine does
    capsys.readouterr()
    ids = submit("digits", **GRID, **SMALL, out=str(out), gpus=4, processes=4, at_once=2, hours=1.5)
    said = capsys.readouterr().out
    assert "4 runs, 1 of them finished; to submit: 3" in said
    assert "python -m experiments compare digits --models cifar_resnet8 --norms original group" in said
    assert ids == ["4242_0", "4242_1", "4242_2"]
    script = (cluster / "submitted").read_text()
    for option in ("array=0-2%2", "time=90", "ntasks-per-node=4", "gpus-per-node=4", "signal=USR2@90"):
        assert f"#SBATCH --{option}\n" in script, script


def test_mistakes_of_submit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KNPortError, match=r"slurm did not take the jobs: .*srun"):
        submit("digits", **GRID, out=str(tmp_path))
    with pytest.raises(KNPortError, match="slurm option 'gpu'; expected KEY=VALUE"):
        submit("digits", **GRID, out=str(tmp_path), slurm=["gpu"])
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(KNPortError, match="pip install submitit"):
        submit("digits", **GRID, out=str(tmp_path))


def as_job(run, folder: Path, number: int, rank: int = 0, count: int = 1) -> None:
    """What submitit does on the machine, in this process."""
    os.environ |= {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": str(number)}
    os.environ |= {"SUBMITIT_LOCAL_NTASKS": str(count), "SUBMITIT_LOCAL_JOB_NUM_NODES": "1"}
    os.environ |= {"SUBMITIT_LOCAL_GLOBALID": str(rank), "SUBMITIT_LOCAL_LOCALID": str(rank)}
    job = DelayedSubmission(Job(run))
    job.set_timeout(60, max_num_timeout=3)
    job.dump(folder / f"{number}_submitted.pkl")
    process_job(folder)


@needs_fork
def test_before_the_time_limit_a_job_saves_and_is_requeued(tmp_path, monkeypatch, kn_net):
    (tmp_path / "jobs").mkdir()
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGUSR2))
        with Processes(lambda: as_job(tiny(tmp_path / "run"), tmp_path / "jobs", 1), tmp_path / "processes") as job:
            assert job.wait() == [submitit.local.local.LOCAL_REQUEUE_RETURN_CODE], job.said()
            assert "stopped at step 7 of 20 and saved" in job.said()
    assert saved_step(tmp_path / "run") == 7
    with Processes(lambda: as_job(tiny(tmp_path / "run"), tmp_path / "jobs", 2), tmp_path / "processes") as job:
        assert job.wait() == [0], job.said()
    train(tiny(tmp_path / "whole"), quiet=True)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@needs_fork
def test_a_job_that_fails_is_named(tmp_path, monkeypatch, kn_net):
    jobs = tmp_path / "runs" / "jobs"
    jobs.mkdir(parents=True)
    run = tiny(tmp_path / "run", batch_size=1000)
    with Processes(lambda: as_job(run, jobs, 1), tmp_path / "processes") as job:
        assert job.wait() == [1]
    failed = submitit.core.core.Job(jobs, "1")
    monkeypatch.setattr(type(failed), "wait", lambda job: None)
    with pytest.raises(KNPortError, match=r"1 of 1 jobs failed; the same .*\n  .*run: .*batch size 1000 is more than"):
        submission._wait([failed], [run])


@pytest.mark.slow
def test_jobs_on_this_machine(tmp_path, monkeypatch):
    """submitit's own processes; two are one training."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)
    one = GRID | {"norms": ["group"], "seeds": [0]}
    submit("digits", **one, **SMALL, processes=2, cluster="local", gpus=0, out=str(tmp_path / "runs"), wait=True)
    (stored,) = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/run.json")]
    assert stored["status"] == "finished"
    assert stored["environment"]["processes"] == 2
