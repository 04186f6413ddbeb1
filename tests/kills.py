"""Kill every command that writes at random moments, run it again, and compare what it leaves with an uninterrupted run.

    PYTHONPATH=.:tests python tests/kills.py --output /tmp/kills --seed 0        # 40 kills, about an hour on two cores

A command is started in a process group of its own, which gets SIGKILL after a random share of the time that the whole takes;
the same command follows, until it was killed often enough and may come to its end. Recipes run nearly every other
command, so that most kills are theirs.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random


RECIPE = "train.recipes {name} --task color --scale 0.004 --output {output}"
EVALUATE = (
    "evaluation.evaluate --model {shared}/whole-vedas/vedas-trained --output {output} "
    "--data {shared}/whole-vedas/test/data.jsonl {shared}/whole-vedas/train/data.jsonl {shared}/whole-vedas/even/data.jsonl"
)
# Name, command, and how often it is killed. `whole-NAME` is what an uninterrupted run left.
COMMANDS = {
    "deeplatent": (RECIPE.replace("{name}", "deeplatent"), 10),
    "lare": (RECIPE.replace("{name}", "lare"), 8),
    "vedas": (RECIPE.replace("{name}", "vedas"), 8),
    "tasks": ("train.data.tasks --task all --n 400 --image-size 112 --output {output} --force --gallery", 4),
    "convert": (
        "conversion.convert_vedas --backbone {shared}/whole-vedas/backbone --output {output} --force --set num_latent_steps=2",
        3,
    ),
    "convert-lare": (
        "conversion.convert_lare --vision-tower {shared}/whole-lare/clip/vision --language-model {shared}/whole-lare/clip/language "
        "--output {output} --force --set window_size=3 extractor_hidden_size=128 extractor_num_heads=4",
        2,
    ),
    "evaluate": (EVALUATE + " --max_new_tokens 48 --batch_size 1", 3),
    "vision": (
        "train.recipes.vision_pretraining --model {output} --data {shared}/whole-vedas/train/data.jsonl --epochs 2",
        2,
    ),
}
PREPARED = {"vision": "whole-vedas/backbone"}  # what an output folder starts with
RESUMED = ("deeplatent", "lare", "vedas", "evaluate")  # these go on where they were
# Whose output a command reads.
NEEDED = {"convert": "vedas", "convert-lare": "lare", "evaluate": "vedas", "vision": "vedas"}
TIMES = ("seconds", "time", "latency")  # parts of the names of fields that no two runs share
LEFTOVERS = (".partial", ".replaced-", ".unfinished", ".lock")


def facts(folder: Path) -> dict[str, str]:
    """By file what two runs have in common: weights, data, pictures, scores and answers; checkpoints of a run are none."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or any(
            part in name for part in ("checkpoint-", "times.jsonl", "trainer_state", "runs/", "run.json")
        ):
            continue
        content = path.read_bytes()
        if "known_answers" in name:
            content = b"there"
        elif path.name in ("results.jsonl", "summary.json"):
            rows = [json.loads(line) for line in (content.splitlines() if path.suffix == ".jsonl" else [content])]
            content = json.dumps([without_times(row) for row in rows], sort_keys=True).encode()
        elif path.suffix not in (".safetensors", ".jsonl", ".png", ".json"):
            content = b"there"
        found[name] = hashlib.sha256(content.replace(str(folder).encode(), b"FOLDER")).hexdigest()
    return found


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if not any(part in key for part in TIMES)}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def start(command: str, log: Path) -> subprocess.Popen:
    with log.open("ab") as said:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        arguments = [sys.executable, "-m", *shlex.split(command)]
        return subprocess.Popen(arguments, stdout=said, stderr=said, start_new_session=True, env=environment)


def run_whole(command: str, log: Path) -> float:
    """Seconds that a command takes.

    Raises:
        RuntimeError: it failed.
    """
    begun, process = time.monotonic(), start(command, log)
    if process.wait():
        raise RuntimeError(f"{command} ended with status {process.returncode}; see {log}.")
    return time.monotonic() - begun


def run_and_kill(command: str, log: Path, seconds: float) -> bool:
    """Whether it was killed, and had not ended before."""
    process = start(command, log)
    try:
        process.wait(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def prepare(name: str, shared: Path, output: Path) -> str:
    """An output folder as the command finds it, and the command."""
    if name in PREPARED:
        shutil.copytree(shared / PREPARED[name], output)
    return COMMANDS[name][0].format(shared=shared, output=output)


def try_command(name: str, shared: Path, rng: Random, kills: int) -> list[str]:
    """Run a command whole and killed; return what is wrong."""
    whole, killed, log = shared / f"whole-{name}", shared / f"killed-{name}", shared / f"{name}.log"
    if name in NEEDED and not (shared / f"whole-{NEEDED[name]}").exists():
        needed = NEEDED[name]
        run_whole(prepare(needed, shared, shared / f"whole-{needed}"), shared / f"{needed}.log")
    seconds = run_whole(prepare(name, shared, whole), log)
    command, done = prepare(name, shared, killed), 0
    # What goes on where it was has its kills dealt over the whole of it. Others start anew.
    share = seconds / kills if name in RESUMED else seconds
    while done < kills:
        if not run_and_kill(command, log, rng.uniform(0.05, 1.0) * share + 0.5):
            print(f"{name}: ended before kill {done + 1}", flush=True)
            break
        done += 1
    run_whole(command, log)
    expected, found = facts(whole), facts(killed)
    wrong = [f"{name}: {one} differs" for one in sorted(expected) if found.get(one) != expected[one]]
    wrong += [f"{name}: {one} is left" for one in sorted(found.keys() - expected.keys())]
    left = [path for path in (*killed.rglob("*"), *shared.glob(f"*killed-{name}*")) if path != killed]
    wrong += [f"{name}: {path} is left" for path in left if any(part in path.name for part in LEFTOVERS)]
    print(f"{name}: {done} kills, {seconds:.0f} s without, {len(wrong)} differences", flush=True)
    return wrong


def run(shared: Path, seed: int = 0, names: list[str] | None = None, kills: int | None = None) -> list[str]:
    rng = Random(seed)
    shared.mkdir(parents=True, exist_ok=True)
    return [
        wrong
        for name in names or COMMANDS
        for wrong in try_command(name, shared, rng, COMMANDS[name][1] if kills is None else kills)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--names", nargs="+", choices=list(COMMANDS))
    parser.add_argument("--kills", type=int, help="of every command, by default as in `COMMANDS`: 40")
    args = parser.parse_args()
    problems = run(args.output.resolve(), args.seed, args.names, args.kills)
    print(*problems or ["The same command gives the same result."], sep="\n")
    sys.exit(bool(problems))
