"""Kills a training run at random moments and resumes it each time: what comes out is what an undisturbed run gives.

    python tests/kill_campaign.py --kills 10 --during-saves 3

`kill -9` of the whole process group, of a run that saves every 20 steps. The moments are steps drawn at random; for
some of them the kill waits until a save is under way, and counts only if a torn save is left on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

CONFIG = '''"""A run of a few seconds over the texts beside this file."""

from pathlib import Path

from configs.run import CheckpointConfig, DataConfig, LossConfig, OptimizerConfig, Run
from model.config import ModelConfig, MoEConfig

HERE = Path(__file__).parent


def run() -> Run:
    return Run(
        model=ModelConfig(
            vocab_size=0, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
            moe=MoEConfig(
                num_experts=4, experts_per_token=2, intermediate_size=32, selection_bias=True, dense_layers=(0,)
            ),
            max_positions=128,
        ),
        data=DataConfig(
            sources=(str(HERE / "a.jsonl"), str(HERE / "b.jsonl.gz")), weights=(0.7, 0.3), validation_fraction=0.1,
            tokenizer=str(HERE / "tokenizer"), sequence_length=32, batch_size=8, cache=str(HERE / "cache"),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=4),
        loss=LossConfig(z_loss=1e-4, bias_update_rate=1e-3),
        checkpoint=CheckpointConfig(every=20),
        accumulate=2, steps=200, validate_every=40, validation_batches=1, spike_factor=50.0,
    )
'''
MEASURED = {
    "seconds_rollout",
    "seconds_scoring",
    "seconds_update",
    "seconds_handover",
    "seconds",
    "tokens_per_second",
    "mfu",
    "memory_bytes",
    "time",
    "resumed_from",
}
"""What two runs of the same steps may differ in."""
POLL_SECONDS = 0.002
PATIENCE_SECONDS = 300.0


def write_project(place: Path) -> Path:
    """Texts, conversations, a tokenizer of bytes and a config in `place`; returns the config."""
    from text_fixtures import byte_tokenizer, chats, sentences, write_jsonl

    place.mkdir(parents=True, exist_ok=True)
    write_jsonl(place / "a.jsonl", sentences(300))
    write_jsonl(place / "b.jsonl.gz", [text.upper() for text in sentences(60)])
    write_jsonl(place / "chats.jsonl", chats(120))
    byte_tokenizer().save(place / "tokenizer")
    config = place / "small.py"
    config.write_text(CONFIG)
    return config


def start(config: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    """`qmax train CONFIG --out OUT ...` in a process group of its own; stderr is a pipe."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "qmax.py"), "train", str(config), "--out", str(out), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What a run says until its end. Raises AssertionError when it fails."""
    said = process.communicate(timeout=PATIENCE_SECONDS)[1]
    assert process.returncode == 0, f"exit {process.returncode}: {said}"
    return said


def records(out: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, in its order."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def step_of(out: Path) -> int:
    """The last step that metrics.jsonl tells of; 0 before the first."""
    try:
        lines = (out / "metrics.jsonl").read_bytes().split(b"\n")
    except OSError:
        return 0
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def log_file(out: Path) -> int:
    """What the system calls the file metrics.jsonl; 0 while there is none."""
    try:
        return (out / "metrics.jsonl").stat().st_ino
    except OSError:
        return 0


def torn_saves(out: Path) -> list[int]:
    """Steps of the saves that are under way, or were when the run died."""
    try:
        names = os.listdir(out / "checkpoints")
    except OSError:
        return []
    return sorted(int(name.removeprefix(".tmp-")) for name in names if re.fullmatch(r"\.tmp-\d+", name))


def hashes(out: Path) -> tuple[int, dict[str, str]]:
    """Step of the newest checkpoint, and the hash of every array in it: weights, optimizer, counters."""
    from model.checkpoint.checkpoints import Checkpoints, leaf_hashes

    checkpoints = Checkpoints(out / "checkpoints", keep=1)
    step = checkpoints.steps()[-1]
    return step, leaf_hashes(checkpoints.restore(step, checkpoints.leaves(step)))


def assert_same(out: Path, undisturbed: Path) -> int:
    """Sees that two runs end in the same bits and tell the same story, each step once; returns the number of arrays."""
    (step, found), (last, wanted) = hashes(out), hashes(undisturbed)
    assert step == last
    assert found.keys() == wanted.keys()
    differing = [name for name, value in wanted.items() if found[name] != value]
    assert not differing, f"{len(differing)} of {len(wanted)} arrays differ: {differing[:5]}"
    assert [record["step"] for record in records(out)] == list(range(1, last + 1))
    assert [story(record) for record in records(out)] == [story(record) for record in records(undisturbed)]
    return len(wanted)


def story(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what depends on the clock."""
    return {name: value for name, value in record.items() if name not in MEASURED}


@dataclass
class Kill:
    """One life of the run: from the step it went on from to the moment of its death."""

    planned: str
    resumed: int = 0
    seconds: float = 0.0
    step: int = 0
    torn: tuple[int, ...] = ()

    @property
    def row(self) -> tuple[object, ...]:
        return self.resumed, self.planned, round(self.seconds, 2), self.step, ", ".join(map(str, self.torn)) or "no"


HEADER = ("kill", "resumed at", "waited for", "seconds of life", "last step in the log", "save under way")


def live(config: Path, out: Path, kill: Kill, after: int, delay: float, words: Sequence[str]) -> Kill:
    """Starts or resumes the run and kills it: past step `after`, `delay` seconds later.

    `kill.planned` says what is waited for: "start" (only the delay), "step", or "save" (the delay runs within one).
    """
    began, log = time.monotonic(), log_file(out)
    process = start(config, out, "--resume", *words)
    while kill.planned != "start" and process.poll() is None and time.monotonic() - began < PATIENCE_SECONDS:
        # This life makes the log anew, after it has cleared away what the one before left half-written.
        alive = log_file(out) != log
        if alive and step_of(out) >= after and (kill.planned == "step" or torn_saves(out)):
            break
        time.sleep(POLL_SECONDS)
    time.sleep(delay)
    kill.seconds = time.monotonic() - began
    os.killpg(process.pid, signal.SIGKILL)
    said = process.communicate(timeout=PATIENCE_SECONDS)[1]
    assert process.returncode == -signal.SIGKILL, f"the run ended before it was killed: {said}"
    found = re.search(r"resuming .* at step (\d+)", said)
    kill.resumed = int(found[1]) if found else 0
    kill.step, kill.torn = step_of(out), () if log_file(out) == log else tuple(torn_saves(out))
    return kill


def campaign(
    config: Path, out: Path, *, steps: int, kills: int, during_saves: int, seed: int = 0, words: Sequence[str] = ()
) -> list[Kill]:
    """Kills the run in `out` at least `kills` times, `during_saves` of them in a save, then lets it end."""
    draw = random.Random(seed)
    words = ["--steps", str(steps), *words]
    saves = set(draw.sample(range(1, kills), during_saves))
    # The last quarter is left free, so that a run does not end before it is killed.
    moments = sorted(draw.randint(1, steps * 3 // 4) for _ in range(kills))
    done: list[Kill] = []
    for number, moment in enumerate(moments):
        planned = "save" if number in saves else "start" if number == 0 and kills > 3 else "step"
        delay = draw.uniform(0.0, {"start": 6.0, "step": 0.1, "save": 0.05}[planned])
        done.append(live(config, out, Kill(planned), moment, delay, words))
    while sum(bool(kill.torn) for kill in done) < during_saves:
        assert len(done) < 2 * kills, "saves are too short to be hit"
        done.append(live(config, out, Kill("save"), 0, draw.uniform(0.0, 0.02), words))
    finish(start(config, out, "--resume", *words))
    return done


def main() -> None:
    """Runs a campaign in a temporary directory and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--during-saves", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, help="a config to train instead of the small one")
    args, words = parser.parse_known_args()
    from terminal import print_table

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        config = args.config or write_project(place)
        began = time.monotonic()
        finish(start(config, place / "undisturbed", "--steps", str(args.steps), *words))
        undisturbed, began = time.monotonic() - began, time.monotonic()
        done = campaign(
            config,
            place / "killed",
            steps=args.steps,
            kills=args.kills,
            during_saves=args.during_saves,
            seed=args.seed,
            words=words,
        )
        print_table([(number, *kill.row) for number, kill in enumerate(done, 1)], HEADER)
        leaves = assert_same(place / "killed", place / "undisturbed")
        torn = sum(bool(kill.torn) for kill in done)
        print(f"{len(done)} kills, {torn} of them during a save, and {args.steps} steps all the same: each of")
        print(f"{leaves} arrays has the hash, and metrics.jsonl has each step once with the values, of a run that")
        print(
            f"nobody disturbed. Seconds: {undisturbed:.0f} undisturbed, {time.monotonic() - began:.0f} with the kills."
        )


if __name__ == "__main__":
    main()
