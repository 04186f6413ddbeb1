"""Write rollouts where they can be looked at: texts with their blocks, rewards, and where the latents looked.

`rollouts-<step>.jsonl` has one line per trajectory. `rollouts-<step>-<line>.png` shows the blocks of one trajectory per
question, drawn over its images by the same function that draws the trace of `generate`.
"""

import json
from pathlib import Path

import torch

from conversion.writing import write_file
from processing_latentvlm.draw_trace import draw_trace
from train.deeplatent.rl.rescoring import replay
from train.deeplatent.rl.rollouts import Trajectory


class RolloutDump:
    """Writes the trajectories of every `every` steps.

    Args:
        folder: made where it is missing.
        pictures: also draw the first trajectory with a block of each question.
    """

    def __init__(self, folder: str | Path, every: int = 1, pictures: bool = False):
        if every < 1:
            raise ValueError(f"Rollouts are dumped every so many steps, at least 1, got {every}.")
        self.folder, self.every, self.pictures = Path(folder), every, pictures

    def __call__(self, model, processor, batches: list[list[Trajectory]], step: int, process: int = 0) -> None:
        if step % self.every:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"rollouts-{step}" + (f"-of-process-{process}" if process else "")
        trajectories = [trajectory for batch in batches for trajectory in batch]
        described = (describe(trajectory, processor, model.config) for trajectory in trajectories)
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in described]
        write_file(self.folder / f"{name}.jsonl", "".join(lines))
        drawn: set[int] = set()
        for line, trajectory in enumerate(trajectories):
            if self.pictures and trajectory.grids and id(trajectory.prompt) not in drawn:
                drawn.add(id(trajectory.prompt))
                draw(model, trajectory, self.folder / f"{name}-{line}.png")


def describe(trajectory: Trajectory, processor, config) -> dict:
    """A trajectory as JSON; its text spells a block as the processor reads it, with its grid."""
    parts, grids, start = [], iter(trajectory.grids), 0
    columns = (trajectory.tokens == config.latent_start_token_id).nonzero().flatten().tolist()
    for column in columns:
        parts.append(processor.tokenizer.decode(trajectory.tokens[start:column]))
        grid = next(grids, None)  # the last may not have been built
        item = {"grid": grid} if grid else None
        parts.append(
            processor.render_latent(item) if item else processor.tokenizer.decode([trajectory.tokens[column]])
        )
        start = column + 1
    parts.append(processor.tokenizer.decode(trajectory.tokens[start:]))
    sample = trajectory.sample
    return {
        "origin": sample.origin,
        "images": [image if isinstance(image, str) else None for image in sample.images],
        "question": sample.question,
        "answer": sample.answer,
        "text": "".join(parts),
        "blocks": [{"token": column, "grid": list(grid)} for column, grid in zip(columns, trajectory.grids)],
        "num_tokens": len(trajectory.tokens),
        "is_truncated": trajectory.is_truncated,
        "rewards": trajectory.rewards,
        "reward": trajectory.reward,
        "advantage": trajectory.advantage,
        "seed": trajectory.seed,
    }


@torch.no_grad()
def draw(model, trajectory: Trajectory, path: Path) -> None:
    was_training = model.training
    model.eval()
    trace = replay(model, [trajectory], output_latents=True).trace
    model.train(was_training)
    draw_trace(trace, trajectory.sample.load_images(), path)
