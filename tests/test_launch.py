"""Law: the launch recipes are whole, and every command of ours in them is one that qmax understands.

SkyPilot's and JobSet's own schemas were asked once (skypilot 0.14.1, jobset 0.13 v1alpha2); they need the network.
"""

from __future__ import annotations

import math
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import qmax
from configs.override import apply_overrides, load_config
from configs.run import Run
from train import main

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "configs" / "launch"


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / name).read_text())


def dry_run(**variables: str) -> list[list[str]]:
    """Words of the commands that gcloud.sh would run."""
    environment = {"PATH": "/usr/bin:/bin", **variables}
    command = ["sh", str(LAUNCH / "gcloud.sh"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [shlex.split(line) for line in done.stdout.splitlines()]


def shell_commands() -> dict[str, list[str]]:
    """Words of every `./run.sh VERB ...` in the recipes, by place."""
    texts = {path.name: path.read_text() for path in (LAUNCH / "skypilot.yaml", LAUNCH / "jobset.yaml")}
    texts["jobset.yaml"] = " ".join(texts["jobset.yaml"].split("- >-\n")[1].split("ports:")[0].split())
    texts["skypilot.yaml"] = read("skypilot.yaml")["run"]
    texts["gcloud.sh"] = "\n".join(words[-1] for words in dry_run())
    found: dict[str, list[str]] = {}
    for name, text in texts.items():
        for number, match in enumerate(re.findall(r"\./run\.sh (.*)", text.replace("\\\n", " "))):
            found[f"{name} {number}"] = shlex.split(match.partition("#")[0].rstrip("& "))
    return found


COMMANDS = shell_commands()


@pytest.mark.parametrize("place", COMMANDS)
def test_qmax_understands_every_command(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    verb, *words = COMMANDS[place]
    assert verb in {verb.name for verb in qmax.VERBS}
    if verb != "train":
        return
    seen: list[tuple[Run, bool]] = []

    def train_run(run: Run, out: Path, *, resume: bool, hosts: object) -> dict[str, object]:
        seen.append((run, resume))
        return {"stopped": ""}

    monkeypatch.setattr(main, "train_run", train_run)
    monkeypatch.chdir(ROOT)
    assert main.train_main(words) == 0
    assert len(seen) == 1
    assert seen[0][1], "without --resume a restart would begin anew, or be refused"


def test_each_recipe_has_its_command() -> None:
    assert {place.split()[0] for place in COMMANDS} == {"skypilot.yaml", "jobset.yaml", "gcloud.sh"}


def test_jobset_is_whole() -> None:
    spec = read("jobset.yaml")
    assert (spec["apiVersion"], spec["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert spec["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert spec["spec"]["network"]["enableDNSHostnames"]
    (job,) = spec["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    assert pods["parallelism"] == pods["completions"]
    assert pods["completionMode"] == "Indexed" and pods["backoffLimit"] == 0
    pod = pods["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(int(size) for size in topology.split("x"))
    assert container["resources"]["limits"]["google.com/tpu"] * pods["parallelism"] == chips
    words = COMMANDS["jobset.yaml 0"]
    run = apply_overrides(load_config(str(ROOT / words[1])), options(words))
    assert run.mesh.num_devices == chips * job["replicas"]
    assert run.mesh.data == job["replicas"]
    assert words[words.index("--stopped-code") + 1] != "0", "a run that was asked to stop must start again"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def options(words: list[str]) -> list[str]:
    """The fields among the words of `train CONFIG ...`."""
    fields = list(words[2:])
    for flag, value in (("--resume", False), ("--stopped-code", True)):
        main.take(fields, flag, value=value)
    return fields


def test_skypilot_is_whole() -> None:
    task = read("skypilot.yaml")
    assert set(task) == {"name", "resources", "envs", "workdir", "file_mounts", "setup", "run"}
    words = COMMANDS["skypilot.yaml 0"]
    code = int(words[words.index("--stopped-code") + 1])
    assert code in task["resources"]["job_recovery"]["recover_on_exit_codes"]
    run = apply_overrides(load_config(str(ROOT / words[1])), options(words))
    assert task["resources"]["accelerators"] == f"tpu-v5p-{2 * run.mesh.num_devices}"
    out = words[words.index("--out") + 1]
    assert any(out.startswith(f"{place}/") for place in task["file_mounts"]), "checkpoints outlive the machines"


def test_gcloud_prints_what_it_would_do() -> None:
    create, install, train = dry_run(NAME="n", ZONE="z", TYPE="v5p-16", IMAGE="i", TRAIN="configs/tiny.py --steps 5")
    start = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert create == [*start, "create", "n", "--zone=z", "--accelerator-type=v5p-16", "--version=i", "--spot"]
    assert install[:8] == train[:8] == [*start, "ssh", "n", "--zone=z", "--worker=all"]
    assert install[8].endswith("cd qmax && ./run.sh doctor")
    assert train[8:] == ["--command=cd qmax && ./run.sh train configs/tiny.py --steps 5 --out /runs/a --resume"]
    for words in (install, train):
        subprocess.run(["bash", "-n", "-c", words[8].removeprefix("--command=")], check=True)
    refused = subprocess.run(["sh", str(LAUNCH / "gcloud.sh"), "--dry"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr) == (2, "usage: gcloud.sh [--dry-run]\n")
