"""Three small models of which it is known whether their latents matter, put through the report like any other.

    python -m evaluation.faithfulness.controls --output out/controls

positive   a LaRe whose answer starts on the prompt's text and the latents alone (`answer_sees_image=False`): the colour that
           it is asked for can reach the answer through the latents and no other way. Other latents must drop it to chance.
negative   a LaRe that sees its image, whose latents are one constant vector (the Extractor's last map is zero but for its
           bias), and which learned with all kinds of values in their place. No replacement may move it.
form       a LaRe with the same constant latents, which learned to answer where just these stand, and to end at once where
           anything else does. Its latents say "answer now" and nothing of the picture: zeros and noise break it, another
           picture's latents change nothing, and a report must not call them meaningful.

All learn, in about a minute on one CPU thread, to name the colour of a square on a noisy picture; the same seed gives the same
models. Their checkpoints, pages and the pictures stay in the folder.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm
from transformers import set_seed
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from configuration_latentvlm import LaReConfig
from conversion.commands import CommandParser, exit_on_error
from conversion.writing import replaced_folder, write_file
from evaluation.answers import encode_questions
from evaluation.faithfulness.architectures import StepArchitecture
from evaluation.faithfulness.arms import ARMS
from evaluation.faithfulness.items import read_items
from evaluation.faithfulness.report import write_report
from evaluation.faithfulness.result import Result
from evaluation.faithfulness.run import take_all
from evaluation.faithfulness.subject import Subject
from modeling_latentvlm import LaReForCausalLM
from modeling_latentvlm.trace import LatentStep
from processing_latentvlm import LaReProcessor
from processing_latentvlm.processing_lare import REFOCUS_TOKENS
from train.data.small_tokenizer import CHAT_TEMPLATE, train_tokenizer


COLORS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (30, 70, 230),
    "yellow": (240, 220, 30),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
    "purple": (150, 40, 180),
    "cyan": (30, 210, 220),
}
QUESTION = "what colour is the square?"
SIZE, PATCH, SQUARE = 56, 14, 28  # pixels
CHANCE = 1 / len(COLORS)
MUST_MOVE = {
    "positive": ("zero", "shared", "gaussian", "matched", "swap", "dummy"),
    "form": ("zero", "constant", "gaussian", "dummy"),
}
MUST_STAY = {"form": ("sham", "shared", "swap", "matched", "first_repeat")}  # negative: all
CONTROLS = {"positive": 500, "negative": 150, "form": 300}  # training steps
USED, UNUSED = "The content of the latents is used", "The answers do not depend on what the latents hold"
HELD = ("negative", "form")  # whose latents are one constant vector
MADE = "made.json"  # beside a checkpoint: what it follows from


def write_questions(folder: Path, count: int, seed: int) -> Path:
    """Squares on noise, every colour equally often, with their boxes."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        name = list(COLORS)[number % len(COLORS)]
        pixels = rng.integers(90, 166, (SIZE, SIZE, 3))
        left, top = (int(place) for place in rng.integers(0, SIZE - SQUARE + 1, 2))
        square = np.array(COLORS[name]) + rng.integers(-10, 11, (SQUARE, SQUARE, 3))
        pixels[top : top + SQUARE, left : left + SQUARE] = square
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number}.png")
        box = [left, top, left + SQUARE, top + SQUARE]
        rows.append({"image": f"images/{number}.png", "question": QUESTION, "answer": name, "boxes": [box]})
    path = folder / "data.jsonl"
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(kind: str) -> tuple[LaReForCausalLM, LaReProcessor]:
    """An untrained control and its processor."""
    tokenizer = train_tokenizer([QUESTION, *COLORS, "user assistant"], 320)
    tokenizer.add_special_tokens({"additional_special_tokens": list(REFOCUS_TOKENS)})
    bot, eot, image = tokenizer.convert_tokens_to_ids(list(REFOCUS_TOKENS))
    config = LaReConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            "initializer_range": 0.1,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIZE,
            "patch_size": PATCH,
        },
        bot_token_id=bot,
        eot_token_id=eot,
        image_token_index=image,
        num_refocus_steps=2,
        window_size=2,
        extractor_hidden_size=64,
        extractor_num_heads=4,
        latent_rms=0.5,
        answer_sees_image=kind in HELD,
    )
    size = {"height": SIZE, "width": SIZE}
    tokenizer.chat_template = CHAT_TEMPLATE
    pictures = CLIPImageProcessorPil(size=size, do_center_crop=False)
    model = LaReForCausalLM(config)
    if kind in HELD:
        hold_latents(model)
    return model, LaReProcessor(pictures, tokenizer, patch_size=PATCH, image_size=SIZE)


def hold_latents(model: LaReForCausalLM) -> None:
    """Make every latent one constant vector, for good."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.refocus.out_proj.weight.zero_()
        model.refocus.out_proj.bias.copy_(torch.randn(model.refocus.out_proj.bias.shape, generator=generator))
    model.refocus.requires_grad_(False)


def any_values(latents: torch.Tensor, step: LatentStep) -> torch.Tensor:
    """Latents, zeros or noise of any size: who learns with these in their place learns to look past them."""
    scale = 10 ** float(torch.empty(()).uniform_(-2.5, 0.7))
    draw = float(torch.rand(()))
    if draw < 0.25:
        return latents
    return scale * torch.randn(latents.shape if draw < 0.7 else latents[:1].shape).expand_as(latents)


def break_rows(is_broken: torch.Tensor, latents: torch.Tensor, step: LatentStep) -> torch.Tensor:
    """Other values in the rows that are to break: zeros, or noise of any size."""
    if not is_broken[step.row]:
        return latents
    scale = 0.0 if float(torch.rand(())) < 0.2 else 10 ** float(torch.empty(()).uniform_(-2.5, 0.7))
    return scale * torch.randn(latents.shape)


def train(kind: str, model: LaReForCausalLM, processor: LaReProcessor, data: Path, num_steps: int) -> float:
    """Teach the answers; returns the mean loss of the last steps."""
    items = read_items(data, "steps", "train", None)
    inputs = dict(encode_questions(processor, [item.sample for item in items]))
    architecture, end = StepArchitecture(model), [processor.tokenizer.eos_token_id]
    answers = [processor.tokenizer(item.answer, add_special_tokens=False)["input_ids"] + end for item in items]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps, pct_start=0.1)
    model.train()
    losses = []
    for _ in (progress := tqdm(range(num_steps), desc=f"training the {kind} control", leave=False)):
        rows = torch.randint(len(items), (32,))
        batch = {name: values[rows] for name, values in inputs.items()}
        chosen, change = [answers[row] for row in rows.tolist()], None
        if kind == "negative":
            change = any_values
        elif kind == "form":
            is_broken = torch.rand(len(rows)) < 0.5
            chosen = [end if broken else answer for answer, broken in zip(chosen, is_broken.tolist())]
            change = partial(break_rows, is_broken)
        is_free = kind == "negative" and float(torch.rand(())) < 0.2
        with architecture.with_latents(0 if is_free else model.config.num_refocus_steps):
            arguments = architecture.teacher_forced(batch, chosen, [])
            logits = model(**arguments, latent_intervention=change).logits
        width = max(map(len, chosen))
        targets = torch.tensor([tokens + [-100] * (width - len(tokens)) for tokens in chosen])
        loss = F.cross_entropy(logits[:, -width - 1 : -1].flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return float(np.mean(losses[-20:]))


def make_control(kind: str, folder: Path, seed: int = 0, count: int = 480) -> Path:
    """Train a control, unless the folder holds it, trained just so; returns the folder with its checkpoint.

    One of another seed, of other steps or questions is trained anew in its place: a page must not show it for the one asked for.

    Raises:
        ValueError: none of `CONTROLS`.
    """
    if kind not in CONTROLS:
        raise ValueError(f"A control is one of {list(CONTROLS)}, got {kind!r}.")
    checkpoint, record = folder / kind, folder / kind / MADE
    made = {"seed": seed, "steps": CONTROLS[kind], "questions": count}
    if not record.is_file() or json.loads(record.read_text(encoding="utf-8")) != made:
        data = write_questions(folder / "train", count, seed + 1)
        set_seed(seed)
        model, processor = build(kind)
        train(kind, model, processor, data, CONTROLS[kind])
        with replaced_folder(checkpoint) as partial:
            processor.save_pretrained(partial)
            model.save_pretrained(partial)
            (partial / MADE).write_text(json.dumps(made), encoding="utf-8")
    return checkpoint


def report_control(kind: str, folder: Path, seed: int = 0, count: int = 96) -> list[Result]:
    """The report on a control, with its page beside the checkpoint."""
    checkpoint = make_control(kind, folder, seed)
    data = write_questions(folder / "test", count, seed + 2)
    model, processor = LaReForCausalLM.from_pretrained(checkpoint), LaReProcessor.from_pretrained(checkpoint)
    subject = Subject(model, processor, read_items(data, "steps", "train", None), 32, 4, seed=seed)
    results = take_all(subject, ARMS)
    write_report(results, {"model": f"{kind} control", "questions": count, "seed": seed}, folder)
    for name in ("faithfulness.html", "faithfulness.json"):
        (folder / name).rename(folder / f"{kind}_{name}")
    return results


def judge(kind: str, rows: list[dict], verdict: str | None = None) -> list[str]:
    """What is not as it must be, in words; empty where the control behaves.

    positive: right with its own latents (>= 90 %), and under every arm without their content within 10 points of chance.
    negative: right (>= 90 %), and no arm changes the accuracy by more than 3 points.
    form: right (>= 90 %), within 10 points of chance where other values stand, and no change where another picture's do.

    Args:
        verdict: what the report says; it must call the positive control's latents used, and no other's.
    """
    clean = rows[0]["accuracy"]
    wrong = [] if clean >= 90 else [f"only {clean:.1f} % right as it is"]
    for row in rows[1:]:
        if row["arm"] in MUST_MOVE.get(kind, ()) and row["accuracy"] > 100 * CHANCE + 10:
            wrong.append(f"{row['arm']} leaves {row['accuracy']:.1f} %")
        must_stay = kind == "negative" or row["arm"] in MUST_STAY.get(kind, ())
        if must_stay and abs(row["change of accuracy"]) > 3:
            wrong.append(f"{row['arm']} changes {row['change of accuracy']:+.1f} points")
    if verdict is not None and not verdict.startswith(USED if kind == "positive" else UNUSED):
        wrong.append(f"the report says {verdict!r}")
    return wrong


def controls_result(folder: Path, seed: int = 0) -> Result:
    """The controls' D1 in one section, with what the report says of each."""
    result = Result(
        "controls",
        "Controls",
        "Three small models trained for this page: one whose answer can come through its latents alone, one whose latents are "
        "constant and do not matter, and one whose latents are constant and must be there for an answer to have its form. The "
        f"same code asked all of them; chance is {100 * CHANCE:.1f} %.",
    )
    for kind in CONTROLS:
        found = next(one for one in report_control(kind, folder, seed) if one.name == "D1")
        rows = result.tables[kind] = found.tables["arms"]
        wrong = judge(kind, rows, found.notes[0])
        result.notes.append(
            f"The {kind} control {'behaves' if not wrong else 'does not behave: ' + '; '.join(wrong)}. Of it the report says: "
            f"{found.notes[0]}"
        )
    result.notes.append(
        "Without steps (K = 0) the positive control is the plain backbone, which sees its image but never learned to."
    )
    return result


def build_parser() -> CommandParser:
    parser = CommandParser(prog="python -m evaluation.faithfulness.controls", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the controls and their pages")
    parser.add_argument("--seed", type=int, default=0, help="seed of questions and training")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    result = controls_result(options.output, options.seed)
    for kind in CONTROLS:
        print(f"{kind} control")
        for row in result.tables[kind]:
            print(
                f"  {row['arm']:16s} {row['accuracy']:5.1f} %  {row['change of accuracy']:+6.1f} [{row['low']:+.1f}, "
                f"{row['high']:+.1f}]  flips {row['flip rate']:.3f}  KL {row['KL']:.4f}"
            )
    print("\n".join(result.notes))


if __name__ == "__main__":
    with exit_on_error():
        main()
