"""Teach a vision tower that starts from nothing what stands in every cell of the procedural scenes.

    python -m train.tasks --task describe --n 8000 --seed 0 --image-size 112 --output data/describe
    python -m train.vision_pretraining --model out/backbone --data data/describe/data.jsonl

Language-model losses alone teach a small tower very slowly: an answer is one word about one of many things. Here linear
heads on its features name color, shape and digit of each cell; the heads are thrown away. The folder is changed in place:
a Qwen2.5-VL backbone (`train.small_backbone`), whose merged patches must be the cells, or a CLIP tower
(`train.lare.small`), whose patches must lie whole in them; CLIP's last layer but one is trained, as LLaVA reads it.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, CLIPVisionModel, Qwen2_5_VLForConditionalGeneration

from train.tasks.shapes import COLORS, DIGITS, GRID, SHAPES


NAMES = {"color": ("", *COLORS), "shape": ("", *SHAPES), "digit": ("", *DIGITS)}


class CellFeatures(nn.Module):
    """A tower's features of every cell of a scene: pixels of B scenes to (B, GRID, GRID, D)."""

    def __init__(self, folder: str | Path):
        super().__init__()
        self.is_clip = AutoConfig.from_pretrained(folder).model_type == "clip_vision_model"
        loader = CLIPVisionModel if self.is_clip else Qwen2_5_VLForConditionalGeneration
        self.model = loader.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder)
        config = self.model.config if self.is_clip else self.model.config.vision_config
        self.size = config.hidden_size if self.is_clip else config.out_hidden_size

    def forward(self, images: list[Image.Image]) -> Tensor:
        inputs = self.processor(images, return_tensors="pt")
        if self.is_clip:
            states = self.model(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        else:
            states = self.model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
            states = states.view(len(images), -1, self.size)
        side = round(states.shape[1] ** 0.5)
        if side % GRID:
            raise ValueError(f"{side} x {side} features of a scene cannot be dealt out to {GRID} x {GRID} cells.")
        per_cell = side // GRID
        return states.unflatten(1, (GRID, per_cell, GRID, per_cell)).mean(dim=(2, 4))


def cell_labels(objects: list[dict], image_size: int) -> Tensor:
    """(GRID, GRID, 3) color, shape and digit of every cell; 0 for none."""
    labels, cell = torch.zeros(GRID, GRID, len(NAMES), dtype=torch.long), image_size // GRID
    for thing in objects:
        left, top, _, _ = thing["box"]
        labels[top // cell, left // cell] = torch.tensor([NAMES[kind].index(thing[kind] or "") for kind in NAMES])
    return labels


def pretrain(
    folder: str | Path,
    data: str | Path,
    epochs: int = 6,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Train the tower in `folder` in place; return the accuracy per kind over cells with a thing, in the last epoch."""
    torch.manual_seed(seed)
    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    images = [Image.open(Path(data).parent / row["image"]).convert("RGB") for row in rows]
    labels = torch.stack([cell_labels(row["objects"], image.width) for row, image in zip(rows, images)])
    tower = CellFeatures(folder)
    heads = nn.ModuleList([nn.Linear(tower.size, len(names)) for names in NAMES.values()])
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], learning_rate, weight_decay=0.01)
    steps = epochs * (len(rows) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 1))
    for _ in range(epochs):
        right = torch.zeros(len(NAMES))
        order, things = torch.randperm(len(rows)), 0
        batches = order[: len(rows) // batch_size * batch_size].split(batch_size)
        for batch in (bar := tqdm(batches, desc="vision", leave=False)):
            features, target = tower([images[number] for number in batch]), labels[batch]
            logits = [head(features) for head in heads]
            loss = sum(
                nn.functional.cross_entropy(one.flatten(0, 2), target[..., k].flatten())
                for k, one in enumerate(logits)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            there = target[..., 0] > 0
            right += torch.stack([((one.argmax(-1) == target[..., k]) & there).sum() for k, one in enumerate(logits)])
            things += int(there.sum())
            bar.set_postfix(loss=f"{float(loss):.3f}")
    tower.model.save_pretrained(folder)
    scores = {kind: float(count) / things for kind, count in zip(NAMES, right)}
    (Path(folder) / "vision_pretraining.json").write_text(json.dumps(scores))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", dest="folder", required=True, help="folder of a backbone or of a CLIP tower")
    parser.add_argument("--data", required=True, help="JSONL of `train.tasks`")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(pretrain(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
