"""Teach a vision tower that starts from nothing what stands in every cell of the procedural scenes.

    python -m train.data.tasks --task describe --n 8000 --seed 0 --image-size 112 --output data/describe
    python -m train.recipes.vision_pretraining --model out/backbone --data data/describe/data.jsonl

For the large scenes of 224 pixels and more, with a cell per merged patch:

    python -m train.data.tasks --task describe_search --n 8000 --seed 0 --output data/scenes
    python -m train.data.tasks --task jigsaw --n 2000 --seed 1 --output data/puzzles
    python -m train.recipes.vision_pretraining --model out/backbone --data data/scenes/data.jsonl data/puzzles/data.jsonl

Language-model losses alone teach a small tower very slowly: an answer is one word about one of many things. Here linear
heads on its features name color, shape and digit of each cell, and what else the data say about cells: the corner at
which a jigsaw piece is at home, the walls of a maze, the value of a bar, the color of the next tile, lines and the beads at their
ends. The heads are thrown away. The folder is replaced: a Qwen2.5-VL backbone (`train.recipes.small_backbone`), whose merged patches must be the cells, or a
CLIP tower (`train.recipes.small_clip`), whose patches must lie whole in them; CLIP's last layer but one is trained, as LLaVA reads
it.
"""

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, CLIPVisionModel, Qwen2_5_VLForConditionalGeneration

from conversion.commands import CommandParser, exit_on_error
from conversion.reading import read_json_lines
from conversion.writing import replaced_folder
from modeling_latentvlm.complete_weights import load_complete
from processing_latentvlm.pictures import open_picture, read_size
from train.data.tasks.arrows import DIRECTIONS
from train.data.tasks.chart import VALUES
from train.data.tasks.lines import LINES
from train.data.tasks.maze import OPEN, WALLS
from train.data.tasks.shapes import COLORS, DIGITS, GRID, MORE_COLORS, QUADRANTS, SHAPES


BEADS = tuple(f"{color} {shape}" for color in (*COLORS, *MORE_COLORS) for shape in ("square", "circle"))
NAMES = {
    "color": ("", *COLORS, *MORE_COLORS),
    "shape": ("", *SHAPES),
    "digit": ("", *DIGITS),
    "home": ("", *QUADRANTS),
    "walls": ("", OPEN, *WALLS),
    "value": ("", *VALUES["easy"]),
    "next": ("", *COLORS, *MORE_COLORS),
    "arrow": ("", *DIRECTIONS),
    "lines": ("", *LINES),
    "side_bead": ("", *BEADS),
    "end_bead": ("", *BEADS),
    "place": ("", *QUADRANTS),  # of the cell itself
}
ALWAYS = 3  # so many of them are learned even where the data have none


class CellFeatures(nn.Module):
    """A tower's features of every cell of a scene: pixels of B scenes to (B, grid, grid, D)."""

    def __init__(self, folder: str | Path):
        super().__init__()
        self.is_clip = AutoConfig.from_pretrained(folder).model_type == "clip_vision_model"
        loader = CLIPVisionModel if self.is_clip else Qwen2_5_VLForConditionalGeneration
        self.model = load_complete(loader, folder)
        self.kept_dtype = self.model.dtype
        self.model.float()  # steps of training are lost on weights of few digits
        self.processor = AutoImageProcessor.from_pretrained(folder)
        config = self.model.config if self.is_clip else self.model.config.vision_config
        self.size = config.hidden_size if self.is_clip else config.out_hidden_size

    def forward(self, images: list[Image.Image], grid: int = GRID) -> Tensor:
        inputs = self.processor(images, return_tensors="pt")
        if self.is_clip:
            states = self.model(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        else:
            states = self.model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
            states = states.view(len(images), -1, self.size)
        side = round(states.shape[1] ** 0.5)
        if side % grid:
            raise ValueError(f"{side} x {side} features of a scene cannot be dealt out to {grid} x {grid} cells.")
        per_cell = side // grid
        return states.unflatten(1, (grid, per_cell, grid, per_cell)).mean(dim=(2, 4))


def cell_labels(objects: list[dict], image_size: int, grid: int = GRID) -> Tensor:
    """(grid, grid, len(NAMES)) what is said of every cell that an object has a part of, by kind; 0 for nothing."""
    labels, cell = torch.zeros(grid, grid, len(NAMES), dtype=torch.long), image_size // grid
    for thing in objects:
        left, top, right, bottom = thing["box"]
        covered = labels[top // cell : -(-bottom // cell), left // cell : -(-right // cell)]
        for number, (kind, names) in enumerate(NAMES.items()):
            if thing.get(kind) is not None:
                covered[..., number] = names.index(str(thing[kind]))
    return labels


def read_scenes(data: str | Path | list[str | Path]) -> tuple[list[Path], Tensor]:
    """The pictures of one or more JSONL files, and the labels of their cells, (pictures, grid, grid, len(NAMES)).

    A picture that several rows ask about is read once.

    Raises:
        ValueError: no row, things that do not stand in cells, or pictures or grids of several sizes.
    """
    paths = [Path(one) for one in (data if isinstance(data, list) else [data])]
    images, labels, sizes = {}, [], set()
    rows = ((path, origin, row) for path in paths for origin, row in read_json_lines(path))
    for path, origin, row in rows:
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("image"), str)
            or not isinstance(row.get("objects"), list)
        ):
            raise ValueError(f"{origin} must be a sample of `train.data.tasks`, with `image` and `objects`.")
        if (grid := row.get("grid", GRID)) is None:  # files of the first version do not say
            raise ValueError(
                f"{row['id']} of {path} cannot teach about cells: its things stand freely (a hard level)."
            )
        image = path.parent / row["image"]
        if image in images:
            continue
        images[image] = None
        size = read_size(image, f"the image {image}")
        sizes.add((size, grid))
        labels.append(cell_labels(row["objects"], size[0], grid))
    if len(sizes) != 1:
        found = ", ".join(f"{size[0]} x {size[1]} pixels with {grid} x {grid} cells" for size, grid in sorted(sizes))
        raise ValueError(f"Pictures and their grids must all be of one size, got {found or 'no picture'}.")
    return list(images), torch.stack(labels)


def place_labels(grid: int) -> Tensor:
    """(grid, grid) the quadrant that each cell lies in; 0 in the middle lines of an odd grid.

    A tower that forgets where its patches lie leaves that to a language model: to LLaVA's, whose positions count words, or
    to Qwen2.5-VL's, whose slowest frequencies are left for the columns.
    """
    half = torch.arange(grid) >= (grid + 1) // 2
    is_middle = (torch.arange(grid) == grid // 2) & bool(grid % 2)
    labels = 1 + 2 * half.long()[:, None] + half.long()
    return labels.masked_fill(is_middle[:, None] | is_middle, 0)


def num_classes(kind: str, labels: Tensor) -> int:
    """How many names of a kind there are to learn: those of a hard level's colors only where there are any."""
    has_few = kind == "color" and labels.max() <= len(COLORS)
    return 1 + len(COLORS) if has_few else len(NAMES[kind])


def load_images(paths: list[Path]) -> list[Image.Image]:
    return [open_picture(path, f"the image {path}") for path in paths]


def pretrain(
    folder: str | Path,
    data: str | Path | list[str | Path],
    epochs: int = 3,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Train the tower in `folder` in place; return the accuracy per kind in the last epoch.

    Color, shape and digit are scored over cells with a colored thing, other kinds over the cells that have them.

    Raises:
        ValueError: data that cannot be used, see `read_scenes`.
    """
    torch.manual_seed(seed)
    images, labels = read_scenes(data)
    batch_size = min(batch_size, len(images))
    grid = labels.shape[1]
    tower = CellFeatures(folder)
    labels[..., list(NAMES).index("place")] = place_labels(grid)
    kinds = [number for number in range(len(NAMES)) if number < ALWAYS or labels[..., number].any()]
    names = [list(NAMES)[number] for number in kinds]
    labels = labels[..., kinds]
    heads = nn.ModuleList(
        [nn.Linear(tower.size, num_classes(name, labels[..., number])) for number, name in enumerate(names)]
    )
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], learning_rate, weight_decay=0.01)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 1))
    for _ in range(epochs):
        right, seen = torch.zeros(len(kinds)), torch.zeros(len(kinds))
        order = torch.randperm(len(images))
        batches = order[: len(images) // batch_size * batch_size].split(batch_size)
        for batch in (bar := tqdm(batches, desc="vision", leave=False)):
            features, target = tower(load_images([images[number] for number in batch]), grid), labels[batch]
            logits = [head(features) for head in heads]
            loss = sum(
                nn.functional.cross_entropy(one.flatten(0, 2), target[..., k].flatten())
                for k, one in enumerate(logits)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            for k, one in enumerate(logits):
                there = target[..., 0 if k < ALWAYS else k] > 0
                right[k] += ((one.argmax(-1) == target[..., k]) & there).sum()
                seen[k] += there.sum()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    scores = {name: float(count / total) for name, count, total in zip(names, right, seen.clamp(min=1))}
    # Swapped whole: a tower that was trained already, in a folder that says otherwise, would be trained twice.
    with replaced_folder(folder, keeps_others=True) as partial:
        tower.model.to(tower.kept_dtype).save_pretrained(partial)
        (partial / "vision_pretraining.json").write_text(json.dumps(scores))
    return scores


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", dest="folder", required=True, help="folder of a backbone or of a CLIP tower")
    parser.add_argument("--data", nargs="+", required=True, help="JSONL of `train.data.tasks`, pictures of one size")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the data")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at a time")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    return parser


def main() -> None:
    print(json.dumps(pretrain(**vars(build_parser().parse_args()))))


if __name__ == "__main__":
    with exit_on_error():
        main()
