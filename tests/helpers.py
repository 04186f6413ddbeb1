"""What several test files need besides fixtures."""

import torch
from torch.testing import assert_close
from transformers.generation import LogitsProcessor, LogitsProcessorList


GREEDY = {
    "do_sample": False,
    "max_new_tokens": 9,
    "eos_token_id": None,
    "return_dict_in_generate": True,
    "output_logits": True,
}


class OpenAt(LogitsProcessor):
    """Makes row r write `<latent>` at the given generated positions and nowhere else; rows repeat for beams."""

    def __init__(self, plan: list[list[int]], prompt_length: int, token: int):
        self.plan, self.prompt_length, self.token = plan, prompt_length, token

    def __call__(self, input_ids, scores):
        at, beams = input_ids.shape[1] - self.prompt_length, len(input_ids) // len(self.plan)
        rows = torch.tensor([at in self.plan[row // beams] for row in range(len(input_ids))])
        forced = torch.full_like(scores, -1e9)
        forced[:, self.token] = 0
        scores = scores.clone()
        scores[:, self.token] = -1e9
        return torch.where(rows[:, None], forced, scores)


def open_at(model, inputs, plan: list[list[int]]) -> LogitsProcessorList:
    length = inputs["input_ids"].shape[1]
    return LogitsProcessorList([OpenAt(plan, length, model.config.latent_start_token_id)])


def vision(inputs) -> dict:
    return {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}


def step_logits(output) -> torch.Tensor:  # (B, T, V)
    return torch.stack(output.logits, dim=1)


def assert_near(actual, expected, tolerance: float = 1e-5) -> None:
    """Equal up to what another order of summation leaves in float32."""
    assert_close(actual, expected, atol=tolerance, rtol=tolerance)
