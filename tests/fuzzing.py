"""A seeded generator of inputs, valid and broken, for everything that reads what users give.

    PYTHONPATH=. python tests/fuzzing.py 10000 --seed 1          # prints inputs and outcomes by target

An input is `right` where its output equals, to 1e-5, that of the same input in plain form, or `refused` where it ends in a
`ValueError`, a `StrictDataclassError` or a `SystemExit`. Everything else is a fault. Input N of a seed is always the same.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import test_lare
import torch
import transformers
from conftest import build_model, picture
from evaluation_material import save_checkpoint
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save_file
from test_analyses import lare_model
from test_vedas import build as build_vedas
from transformers import AutoProcessor

from configuration_latentvlm import DeepLatentConfig, LaReConfig, VedasConfig
from conversion.checkpoint_io import SourceWeights
from conversion.commands import exit_on_error
from evaluation.rows import read_evaluation
from modeling_latentvlm import LaReForCausalLM
from train.data.chats import read_trajectories
from train.data.reasoning_data import read_reasoning
from train.data.small_tokenizer import texts_of
from train.data.tasks import write_dataset
from train.data.tasks.gallery import write_gallery
from train.deeplatent.trajectories import Trajectories
from train.lare.data import read_llava


REFUSALS = (ValueError, StrictDataclassError, SystemExit)
KINDS = ("deeplatent", "lare", "vedas")
JUNK = (None, True, -1, 0, 5, 10**30, 1.5, math.nan, math.inf, "", " ", "\ud800", "x" * 5000, "\0", "../../nothing")
JUNK += ([], {}, [[]], [None], {"type": None}, {"type": "latent"}, [1, 2, 3], ["a", {"b": []}])


class Case(NamedTuple):
    """One input.

    Args:
        run: gives an output, or raises.
        plain: gives that of the same input in plain form; called where `run` gave one.
        is_valid: it must not be refused.
        mentions: a refusal must say one of these: the file or the row.
    """

    run: Callable[[], Any]
    plain: Callable[[], Any]
    is_valid: bool
    mentions: tuple[str, ...] = ()


def mutate(rng: Random, value: Any, depth: int = 0) -> Any:
    """The value with one part of it replaced, lost or doubled."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85 - 0.1 * depth:
        changed = copy.copy(value)
        key = rng.choice(list(changed) if isinstance(changed, dict) else range(len(changed)))
        action = rng.random()
        if action < 0.7:
            changed[key] = mutate(rng, changed[key], depth + 1)
        elif action < 0.85:
            del changed[key]
        elif isinstance(changed, dict):
            changed[rng.choice(["extra", "", "type", "\ud800"])] = rng.choice(JUNK)
        else:
            changed.insert(key, rng.choice(JUNK))
        return changed
    return copy.deepcopy(rng.choice(JUNK))


class Material:
    """Small checkpoints, pictures and files that inputs are made of."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pictures = [folder / f"{number}.png" for number in range(3)]
        for number, path in enumerate(self.pictures):
            picture(56, 56, number).save(path)
        self.processors, self.models = {}, {}
        for kind in KINDS:
            save_checkpoint(kind, folder / kind)
            self.processors[kind] = AutoProcessor.from_pretrained(folder / kind)
        self.models["deeplatent"] = build_model(self.processors["deeplatent"].tokenizer, max_latent_blocks=1)
        self.models["lare"] = lare_model(self.processors["lare"])
        self.models["vedas"] = build_vedas(self.processors["vedas"].tokenizer)
        self.configs = {kind: json.loads(self.models[kind].config.to_json_string()) for kind in KINDS}
        rows = write_dataset("color", 2, 0, folder / "tasks", image_size=112).read_text().splitlines()
        self.tasks = [json.loads(row) for row in rows]
        small = test_lare.build(extractor_hidden_size=8)
        small.save_pretrained(folder / "small")
        for name in [path.name for path in (folder / "small").iterdir()]:
            if name not in ("config.json", "model.safetensors"):
                (folder / "small" / name).unlink()


# Processors


def draw_conversation(rng: Random, kind: str, material: Material) -> list[dict]:
    """A chat in plain form: lists of items, opened pictures."""
    latent = {"deeplatent": {"grid": [rng.randint(1, 3), rng.randint(1, 3)]}, "vedas": {"steps": 2}, "lare": {}}[kind]
    messages = []
    for turn in range(rng.choice([1, 1, 1, 3])):
        words = " ".join(
            rng.choices(["what", "colour", "é", "红", "is", "\n", "🙂", "left?", "<b>"], k=rng.randint(1, 6))
        )
        if turn % 2 == 0:
            images = [
                {"type": "image", "image": rng.choice(material.pictures)} for _ in range(rng.choice([0, 1, 1, 2]))
            ]
            messages.append({"role": "user", "content": [*images, {"type": "text", "text": words}]})
        else:
            items = [{"type": "latent", **latent}] if rng.random() < 0.4 else []
            messages.append({"role": "assistant", "content": [*items, {"type": "text", "text": words}]})
    return messages


def open_all(messages: list) -> list:
    """Pictures as PIL has them: the plain form."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for item in message.get("content") or [] if isinstance(message, dict) else []:
            if isinstance(item, dict) and isinstance(item.get("image"), Path):
                with Image.open(item["image"]) as image:
                    item["image"] = image.convert("RGB")
    return messages


def dress(rng: Random, messages: list) -> list:
    """The same chat in other words: texts as strings, tuples for lists, paths for pictures."""
    messages = copy.deepcopy(messages)
    for message in messages:
        content = message["content"]
        for item in content:
            if "image" in item:
                item["image"] = str(item["image"])
            if "grid" in item and rng.random() < 0.5:
                item["grid"] = tuple(item["grid"])
        if len(content) == 1 and content[0]["type"] == "text" and rng.random() < 0.5:
            message["content"] = content[0]["text"]
        if rng.random() < 0.1:
            message["name"] = "somebody"
    return messages


def fuzz_processor(rng: Random, material: Material, folder: Path) -> Case:
    kind = rng.choice(KINDS)
    processor, messages = material.processors[kind], draw_conversation(rng, kind, material)
    is_valid, is_batched = rng.random() < 0.5, rng.random() < 0.4

    def process(conversation) -> dict:
        options = {"processor_kwargs": {"padding": True}} if is_batched else {}
        conversation = [conversation] if is_batched else conversation
        return dict(
            processor.apply_chat_template(
                conversation, tokenize=True, return_dict=True, return_tensors="pt", **options
            )
        )

    if not is_valid and rng.random() < 0.2:
        text = rng.choice([*JUNK, "<|image_pad|>", "<|latent|>", "<|latent_start|>3x", "<|refocus_image|>", ["a", 5]])
        images = rng.choice([None, open_all(messages)[0]["content"][0].get("image"), []])
        return Case(
            lambda: dict(processor(images=images, text=text)),
            lambda: dict(processor(images=images, text=[text] if isinstance(text, str) else text)),
            False,
        )
    given = dress(rng, messages)
    if is_valid:
        return Case(lambda: process(given), lambda: process(open_all(messages)), True)
    # A wrong picture is the business of whoever opens pictures: here chats are broken, not images.
    broken = [mutate(rng, one) if number == 0 else one for number, one in enumerate(open_all(messages))]
    for message in broken[:1]:
        items = message.get("content") if isinstance(message, dict) else None
        for item in items if isinstance(items, list) else []:
            if isinstance(item, dict) and item.get("type") == "image":
                item["image"] = picture(56, 56, 0)
    return Case(lambda: process(broken), lambda: process(open_all(broken)), False)


# Generation


def fuzz_generate(rng: Random, material: Material, folder: Path) -> Case:
    kind = rng.choice(KINDS)
    model, processor = material.models[kind], material.processors[kind]
    messages = [one for one in draw_conversation(rng, kind, material) if one["role"] == "user"][:1]
    inputs = dict(
        processor.apply_chat_template(
            open_all(messages), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
    )
    settings = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def generate(**changes) -> dict:
        output = model.generate(
            **{name: value for name, value in (inputs | settings | changes).items() if value is not None}
        )
        length = output.sequences.shape[1] - settings["max_new_tokens"]
        return {"tokens": output.sequences[:1, length:], "logits": torch.stack(output.logits)[:, :1]}

    if rng.random() < 0.6:
        forms = [
            {"attention_mask": None},
            {"attention_mask": inputs["attention_mask"].int()},
            {"input_ids": inputs["input_ids"].clone(memory_format=torch.contiguous_format)},
            {"inputs": inputs["input_ids"], "input_ids": None},
            {"temperature": 1.0},
            {"output_latents": True},
            {"num_beams": 1},
            {"latent_intervention": None},
        ]
        changes = rng.choice(forms)
        return Case(lambda: generate(**changes), generate, True)
    broken = [
        {"latent_intervention": "nonsense"},
        {"latent_intervention": 5},
        {"output_latents": True, "return_dict_in_generate": False},
        {"position_ids": torch.arange(3)[None]},
        {"pixel_values": torch.zeros(3)} if "pixel_values" in inputs else {"max_new_tokens": -1},
    ]
    if find_spec("modeling_latentvlm.prompt_checks"):
        ids = inputs["input_ids"]
        broken += [
            {"input_ids": ids[:, :0], "attention_mask": None},
            {"attention_mask": torch.zeros_like(ids)},
            {"input_ids": ids.float()},
            {"latent_grid": 5},
        ]
        if "pixel_values" in inputs:
            broken += [{"pixel_values": torch.full_like(inputs["pixel_values"], math.nan)}]
    changes = rng.choice(broken)
    return Case(lambda: generate(**changes), generate, False)


# Configs


OWN_FIELDS = {
    "deeplatent": {
        "latent_mode": ["parallel", "autoregressive"],
        "max_latent_blocks": [0, 3],
        "latent_grid_size": [4, 16],
        "latent_scale": ["predicted", "fixed"],
        "log_sigma_init": [-4.0, 0.0],
        "latentformer_heads": [4, 2],
        "latent_start_token_id": [290],
        "fixed_latent_grid": [[1, 1], None],
        "scale_loss_weight": [0.0, 0.5],
    },
    "lare": {
        "num_refocus_steps": [0, 3],
        "adaptive_stop": [None, "l2"],
        "stop_threshold": [0.1, 1.0],
        "window_size": [1, 2],
        "extractor_num_heads": [1, 2],
        "latent_tokens_per_step": [None, 2],
        "latent_rms": [0.3],
        "bot_token_id": [3],
    },
    "vedas": {
        "latent_token_id": [7],
        "num_latent_steps": [0, 2],
        "num_replay_tokens": [1, 8],
        "replay_scale": [1.0],
        "routed_layers": [[0], []],
        "routing_scope": ["incremental", "context"],
        "num_routed_tokens": [1, 32],
        "alpha_schedule": ["cosine"],
    },
}
CLASSES = {"deeplatent": DeepLatentConfig, "lare": LaReConfig, "vedas": VedasConfig}


def fuzz_config(rng: Random, material: Material, folder: Path) -> Case:
    kind = rng.choice(KINDS)
    cls, fields = CLASSES[kind], copy.deepcopy(material.configs[kind])
    known, is_valid = OWN_FIELDS[kind], rng.random() < 0.5
    for name in rng.sample(list(known), rng.randint(0, 2 if is_valid else 1)):
        fields[name] = rng.choice(known[name])
    if not is_valid:
        fields[rng.choice(list(known))] = copy.deepcopy(rng.choice(JUNK))
    if rng.random() < 0.5:  # from a file
        path = folder / "config.json"
        content = rng.choice([[], "x", 5, None, [fields]]) if not is_valid and rng.random() < 0.2 else fields
        path.write_text(json.dumps(content))
        return Case(lambda: cls.from_pretrained(folder).to_dict(), lambda: cls.from_dict(fields).to_dict(), is_valid)
    return Case(
        lambda: cls.from_dict(copy.deepcopy(fields)).to_dict(),
        lambda: cls.from_dict(json.loads(cls.from_dict(copy.deepcopy(fields)).to_json_string())).to_dict(),
        is_valid,
    )


# Data files


def describe(value: Any) -> Any:
    """What was read, in terms that can be compared."""
    if isinstance(value, list | tuple):
        return [describe(one) for one in value]
    if isinstance(value, dict):
        return {key: describe(one) for key, one in value.items() if key != "origin"}
    if hasattr(value, "origin"):
        return {key: describe(one) for key, one in vars(value).items() if key not in ("origin", "data")}
    return value


def read_messages(path: Path) -> Any:
    data = Trajectories(path, chain_of_thought="text")
    return [data[number] for number in range(len(data))]


def read_gallery(path: Path) -> str:
    return write_gallery(path, path.with_suffix(".html")).read_text()


READERS: dict[str, tuple[Callable, str]] = {
    "trajectories": (read_trajectories, "chat"),
    "messages": (read_messages, "chat"),
    "llava": (read_llava, "llava"),
    "steps": (read_reasoning, "task"),
    "m3cot": (lambda path: read_reasoning(path, "m3cot"), "m3cot"),
    "evaluation": (lambda path: read_evaluation([path]), "task"),
    "texts": (texts_of, "task"),
    "gallery": (read_gallery, "task"),
}


def draw_row(rng: Random, layout: str, material: Material) -> dict:
    row = copy.deepcopy(rng.choice(material.tasks))
    image = f"tasks/{row['image']}"
    if layout == "llava":
        turns = [("human", f"<image>\n{row['question']}"), ("gpt", row["answer"])]
        return {"image": image, "conversations": [{"from": who, "value": value} for who, value in turns]}
    if layout == "m3cot":
        steps = "I look. It is there."
        return {"image": image, "question": row["question"], "choices": ["a", "b"], "rationale": steps, "answer": "A"}
    if layout == "chat":
        question = [{"type": "image", "image": image}, {"type": "text", "text": row["question"]}]
        return {
            "messages": [
                {"role": "user", "content": question},
                {
                    "role": "assistant",
                    "content": rng.choice([row["answer"], [{"type": "text", "text": row["answer"]}]]),
                },
            ]
        }
    row["image"] = image
    row["assistant_images"] = [f"tasks/{one}" for one in row["assistant_images"]]
    for message in row["messages"]:
        for item in message["content"]:
            if item["type"] == "image":
                item["image"] = f"tasks/{item['image']}"
    return row


def spell(rng: Random, row: Any) -> bytes:
    """A row as JSON in another spelling."""
    if isinstance(row, dict) and rng.random() < 0.5:
        row = dict(rng.sample(list(row.items()), len(row)))
    spaces = rng.choice([None, (",", ":"), (" ,  ", " : ")])
    text = json.dumps(row, separators=spaces, ensure_ascii=True if rng.random() < 0.7 else "\ud800" in str(row))
    return text.encode("utf-8", "surrogatepass") + rng.choice([b"", b"", b" ", b"\r"])


def fuzz_data(rng: Random, material: Material, folder: Path) -> Case:
    read, layout = READERS[rng.choice(list(READERS))]
    is_valid = rng.random() < 0.5
    rows = [draw_row(rng, layout, material) for _ in range(rng.randint(1, 2))]
    for number, row in enumerate(rows):
        row["id"] = f"row {number}"
    if not is_valid:
        rows[-1] = mutate(rng, rows[-1])
    lines = [spell(rng, row) for row in rows]
    content = (b"\n" + b"\n" * (rng.random() < 0.2)).join(lines) + rng.choice([b"", b"\n"])
    if not is_valid and rng.random() < 0.3:
        content = rng.choice(
            [
                b"",
                b"\xff\xfe" + content,
                content[: len(content) // 2],
                b"[" * 100_000,
                b'{"messages": ' * 3000,
                content + b"\n{",
                b"null",
            ]
        )
    path, plain = folder / "data.jsonl", folder / "plain.jsonl"
    path.write_bytes(content)

    def in_plain_form():
        plain.write_text("".join(json.dumps(json.loads(line)) + "\n" for line in content.splitlines() if line.strip()))
        return describe(read(plain))

    return Case(lambda: describe(read(path)), in_plain_form, is_valid, ("data.jsonl", "row"))


# Checkpoint files


def fuzz_checkpoint(rng: Random, material: Material, folder: Path) -> Case:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(material.folder / "small" / name, folder / name)
    is_valid = rng.random() < 0.4
    target = folder / rng.choice(["config.json", "model.safetensors"])
    if is_valid:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(dict(rng.sample(list(fields.items()), len(fields)))))
        if rng.random() < 0.5:
            save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    else:
        content = bytearray(target.read_bytes())
        action, header = rng.random(), 8 + int.from_bytes(content[:8], "little")
        if action < 0.5:
            end = min(len(content), header) if target.suffix == ".safetensors" else len(content)
            content[rng.randrange(8 if end == header else 0, end)] ^= 1 << rng.randrange(7)
        elif action < 0.7:
            del content[rng.randrange(len(content)) :]
        elif action < 0.8:
            content = bytearray(rng.choice([b"", b"[]", b"null", b"\xff" * 50, b"[" * 50_000]))
        elif target.suffix == ".json":
            fields = json.loads(content)
            fields.pop(rng.choice([name for name in fields if name not in ("text_config", "vision_config")]))
            content = bytearray(json.dumps(fields).encode())
        else:
            weights = load_file(target)
            weights.pop(rng.choice(list(weights)))
            save_file(weights, target, {"format": "pt"})
            content = bytearray(target.read_bytes())
        target.write_bytes(content)

    def load(place: Path) -> dict:
        with exit_on_error():
            return LaReForCausalLM.from_pretrained(place).state_dict()

    def in_plain_form():
        again = folder / "plain"
        again.mkdir()
        (again / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())))
        save_file(load_file(folder / "model.safetensors"), again / "model.safetensors", {"format": "pt"})
        SourceWeights(again)
        return load(again)

    return Case(lambda: load(folder), in_plain_form, is_valid)


TARGETS: dict[str, tuple[Callable[[Random, Material, Path], Case], int]] = {  # with their shares
    "processor": (fuzz_processor, 5),
    "generate": (fuzz_generate, 2),
    "config": (fuzz_config, 5),
    "data": (fuzz_data, 5),
    "checkpoint": (fuzz_checkpoint, 3),
}


def is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        one, other = torch.from_numpy(one), torch.from_numpy(other)
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.shape == other.shape
        return same and torch.allclose(one.double(), other.double(), atol=1e-5, rtol=0, equal_nan=True)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(is_equal(one[key], other[key]) for key in one)
        )
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(is_equal, one, other))
    return one == other or (one != one and other != other)


def try_case(case: Case) -> tuple[str, str]:
    """(outcome, what is wrong with it): nothing is wrong where it is right or refused."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            output = case.run()
    except REFUSALS as error:
        outcome, text = type(error).__name__, f"{error}{said.getvalue()}"
        if case.is_valid:
            return outcome, f"a valid input was refused: {text}"
        if case.mentions and not any(name in text for name in case.mentions):
            return outcome, f"the refusal names neither file nor row: {text}"
        return outcome, ""
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return type(error).__name__, repr(error)[:300]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            wanted = case.plain()
        except Exception as error:
            return "unlike its plain form", f"which is refused: {error!r}"
    return ("right", "") if is_equal(output, wanted) else ("unlike its plain form", "another output")


def run(count: int, seed: int = 0, only: str | None = None) -> tuple[dict[str, Counter], Counter, list[str]]:
    """Outcomes and numbers of valid inputs by target, and a description of every fault."""
    outcomes, valid, faults = defaultdict(Counter), Counter(), []
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    names = [name for name, (_, share) in TARGETS.items() for _ in range(share)]
    with tempfile.TemporaryDirectory() as place:
        material = Material(Path(place))
        for number in range(count):
            rng = Random(f"{seed} {number}")
            name = rng.choice(names)
            if only not in (None, name):
                continue
            folder = Path(place) / "case"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / "tasks").symlink_to(material.folder / "tasks")
            case = TARGETS[name][0](rng, material, folder)
            outcome, fault = try_case(case)
            outcomes[name][outcome] += 1
            valid[name] += case.is_valid
            if fault:
                faults.append(f"input {number} of seed {seed} ({name}): {outcome}: {fault}")
    return outcomes, valid, faults


def table(outcomes: dict[str, Counter], valid: Counter) -> str:
    lines = []
    for name, counts in sorted(outcomes.items()):
        total = sum(counts.values())
        shares = ", ".join(f"{outcome} {100 * part / total:.1f} %" for outcome, part in counts.most_common())
        lines.append(f"{name:10s} {total:6d} inputs, {100 * valid[name] / total:.0f} % valid: {shares}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(TARGETS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    outcomes, valid, faults = run(args.count, args.seed, args.only)
    print(table(outcomes, valid), *faults, sep="\n")
    sys.exit(bool(faults))
