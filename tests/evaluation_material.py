"""Tiny checkpoints of every kind, and small files of questions, for tests of the evaluation and of its adapters."""

import base64
import csv
import io
import json
from pathlib import Path

from conftest import CHAT_TEMPLATE, build_model, build_tokenizer, picture, stock_twin
from test_analyses import lare_model, lare_processor
from test_vedas import build as build_vedas
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from configuration_latentvlm import ARCHITECTURES
from conversion.known_answers import record_answers
from processing_latentvlm import DeepLatentProcessor, VedasProcessor
from processing_latentvlm.processing_deeplatent import LATENT_TOKENS
from processing_latentvlm.processing_vedas import LATENT_TOKEN
from train.recipes.shipping import write_sums


KINDS = ("deeplatent", "lare", "vedas", "plain")
QUESTIONS = ("what colour?", "which of the two is the small round one, left or right?", "how many?")


def save_checkpoint(kind: str, folder: Path, **fields) -> Path:
    """A random model and its processor."""
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
    if kind == "lare":
        processor = lare_processor()
        model = lare_model(processor, **fields)
    elif kind == "vedas":
        tokenizer = build_tokenizer((LATENT_TOKEN,))
        processor = VedasProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)
        model = build_vedas(tokenizer, **fields)
    else:
        tokenizer = build_tokenizer(LATENT_TOKENS)
        model = build_model(tokenizer, **fields)
        if kind == "plain":  # saved as a backbone is: tokenizer and image processor, no processor of ours
            model = stock_twin(model)
            tokenizer.chat_template = CHAT_TEMPLATE
            tokenizer.save_pretrained(folder)
        processor = images
        if kind != "plain":
            controls = model.config.num_control_tokens
            processor = DeepLatentProcessor(images, tokenizer, CHAT_TEMPLATE, num_control_tokens=controls)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def ship_random(folder: Path) -> Path:
    """Random models as `train.recipes.shipping` ships trained ones."""
    for name in ARCHITECTURES:
        save_checkpoint(name, folder / name)
        record_answers(folder / name)
        write_sums(name, folder)
    return folder


def write_jsonl(folder: Path, count: int = 5, **changes) -> Path:
    """Questions of unequal length about pictures of unequal size; `changes` go into the last row."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        picture(56 + 28 * (number % 2), 56, number).save(folder / f"{number}.png")
        rows.append(
            {
                "id": f"q{number}",
                "image": f"{number}.png",
                "question": QUESTIONS[number % 3],
                "answer": ("red", "left", "3")[number % 3],
                "task": ("color", "position", "count")[number % 3],
            }
        )
    rows[-1] |= changes
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def encoded(seed: int) -> str:
    buffer = io.BytesIO()
    picture(56, 56, seed).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_tsv(path: Path, count: int = 4, **changes) -> Path:
    """A table in VLMEvalKit's layout with images inside; the last row shares the first one's. `changes` go into row 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "index": number,
            "image": encoded(number) if number < count - 1 else "0",
            "question": f'what colour is "it", {number}?',
            "A": "red",
            "B": "green",
            "C": "blue" if number % 2 else "",
            "answer": "AB"[number % 2],
            "hint": "look" if number == 0 else "",
            "category": ("near", "far")[number % 2],
        }
        for number in range(count)
    ]
    rows[1] |= changes
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    return path


LMMS_TASK = """task: local_questions
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_visual: !function utils.images_of
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 12
  temperature: 0
process_results: !function utils.compare
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
metadata:
  version: 0
"""
LMMS_FUNCTIONS = """from pathlib import Path

from PIL import Image


def images_of(row):
    return [Image.open(Path({folder!r}) / row["image"])]


def compare(row, answers):
    return {{"right": float(answers[0].strip() == row["answer"])}}
"""


def write_lmms_task(folder: Path, data: Path) -> Path:
    """A task of lmms-eval over a local JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "local_questions.yaml").write_text(LMMS_TASK.format(data=data))
    (folder / "utils.py").write_text(LMMS_FUNCTIONS.format(folder=str(data.parent)))
    return folder
