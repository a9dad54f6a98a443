"""`qmax train CONFIG`: resolve the config, build the job, run it."""

from __future__ import annotations

from pathlib import Path

from configs.override import apply_overrides, config_docstring, describe, find_config, load_config, to_dict
from configs.run import Run
from errors import UserError
from sharding.hosts import OPTIONS, Hosts, find_hosts, join_hosts
from sharding.peers import check_alike, together
from sharding.runtime import configure_jax, emulate_devices
from train.data.system import be_quiet

USAGE = """usage: qmax train CONFIG [--FIELD VALUE ...] [--resume] [--json FILE]

Trains the model that CONFIG describes: a Python file with a function run() that returns a Run, or the
name of one in configs/. Its `objective` says what is learned from: text (pretrain), conversations (sft),
pairs of replies (dpo, reward), judged replies (kto), rewards for own replies (rl), a teacher (distill).
Any field can be given another value. train/README.md shows every objective.

examples:
  qmax train configs/tiny.py --steps 200 --optimizer.learning-rate 1e-3 --out runs/first
  qmax train configs/tiny.py --mesh.fsdp 4 --mesh.tensor 2          # on eight devices
  qmax train configs/tiny.py --out runs/first --resume              # goes on where it stopped
  qmax train configs/tiny.py --objective sft --init-from runs/first --data.sources chats.jsonl --out runs/chats

options:
  -h, --help   show this; after a CONFIG, every field with its value and meaning too
  --resume     continue from the newest good checkpoint in --out; starts afresh when there is none
  --json FILE  write the last step's metrics there
  --stopped-code N  exit code of a run that was asked to stop before its last step (default 0): for
               a supervisor that starts again only what has failed

Several processes, each of which runs the same command (sharding/README.md). Cloud TPU VMs, GKE, Slurm
and Open MPI are found without these; so are JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID:

  --coordinator HOST:PORT  where process 0 can be reached
  --processes N            how many there are
  --process I              which one this is, from 0

`qmax train CONFIG --help` lists every field with its value and meaning."""


def take(argv: list[str], flag: str, *, value: bool) -> str | bool | None:
    """Removes `flag` from `argv`; returns its value, or whether it was there."""
    for index, word in enumerate(argv):
        if word == flag or word.startswith(flag + "="):
            if not value:
                del argv[index]
                return True
            if "=" in word:
                del argv[index]
                return word.split("=", 1)[1]
            if index + 1 == len(argv):
                raise UserError(f"{flag} needs a value")
            found = argv[index + 1]
            del argv[index : index + 2]
            return found
    return None if value else False


def train_main(argv: list[str]) -> int:
    """The verb. Returns the exit code."""
    words = list(argv)
    if not words or words[0].startswith("-"):
        if not {"-h", "--help"} & set(words):
            raise UserError("name a config, such as configs/tiny.py; qmax train --help explains")
        print(USAGE)
        return 0
    name = words.pop(0)
    if {"-h", "--help"} & set(words):
        print(f"{USAGE}\n\n{config_docstring(find_config(name))}\n\n{describe(load_config(name))}")
        return 0
    resume = bool(take(words, "--resume", value=False))
    json_file = text_of(words, "--json")
    stopped_code = exit_code(text_of(words, "--stopped-code") or "0")
    coordinator, processes, process = (text_of(words, option) for option in OPTIONS)
    hosts = find_hosts((coordinator, processes, process))
    run = apply_overrides(load_config(name), words)
    out = Path(run.out or Path("runs") / Path(name).stem)
    with together():
        result = train_run(run, out, resume=resume, hosts=hosts)
        if json_file and is_first():
            from terminal import write_json

            write_json(json_file, result)
    return stopped_code if result["stopped"] else 0


def text_of(words: list[str], flag: str) -> str | None:
    """Removes `flag` and its value from `words`; returns the value."""
    found = take(words, flag, value=True)
    return found if isinstance(found, str) else None


def exit_code(text: str) -> int:
    """The value of --stopped-code."""
    if not text.isdecimal() or int(text) > 255:
        raise UserError(f"--stopped-code={text!r} must be a number from 0 to 255")
    return int(text)


def is_first() -> bool:
    """Whether this is the process that writes for all; jax has started."""
    import jax

    return jax.process_index() == 0


def train_run(run: Run, out: Path, *, resume: bool, hosts: Hosts | None = None) -> dict[str, object]:
    """Trains `run` into the directory `out`; returns the first and last records.

    Args:
        hosts: the processes that do it together, as `find_hosts` gives them; None leaves it to jax to find out.
    """
    emulate_devices(-(-run.mesh.num_devices // (hosts.processes if hosts else 1)))
    configure_jax(train=True)
    join_hosts(hosts)
    check_alike({**to_dict(run), "resume": resume})
    if not is_first():
        be_quiet()
    from train.loop import train
    from train.metrics import read_metrics
    from train.setup import find_start, prepare_job, say

    checkpoints, start = find_start(run, out, resume=resume)
    if start is not None and start >= run.steps:
        say(f"the run in {out} is finished, at step {start} of {run.steps}; a larger --steps goes on with it")
        records = read_metrics(out) or [{}]
        return {"step": start, "first": records[0], "last": records[-1], "stopped": ""}
    return train(prepare_job(run, out, checkpoints, start), resume=resume)
