"""What several test files need besides fixtures."""

import subprocess
import sys

import pytest
import torch
import transformers
from packaging.version import Version
from torch.testing import assert_close
from transformers.generation import LogitsProcessor, LogitsProcessorList

from configuration_latentvlm.transformers_api import CHECKPOINTING as CHECKPOINTING


# Announce that a name will be gone one day. In a `core` test, and in the processes that it starts, they are errors.
DEPRECATION_WARNINGS = ("FutureWarning", "DeprecationWarning")
# Until 5.20 `pipeline` itself called `generate` in a deprecated way, whatever its caller did.
OLD_PIPELINE = "Passing `generation_config` together with generation-related arguments"

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


def enable_checkpointing(model, settings: dict | None = None) -> None:
    getattr(model, f"{CHECKPOINTING}_enable")(settings)


def disable_checkpointing(model) -> None:
    getattr(model, f"{CHECKPOINTING}_disable")()


def deprecations_in(log: str) -> list[str]:
    """The lines of a log of transformers that say that a name is deprecated: not everything comes as a warning."""
    lines = [line for line in log.splitlines() if "deprecated" in line.lower()]
    if Version(transformers.__version__) < Version("5.21"):
        lines = [line for line in lines if OLD_PIPELINE not in line]
    return lines


def run_strictly(*arguments: str, **settings) -> subprocess.CompletedProcess:
    """Run another Python, in which a deprecation is an error, whether it comes as a warning or as a log record."""
    strict = [f"-Werror::{kind}" for kind in DEPRECATION_WARNINGS]
    done = subprocess.run(
        [sys.executable, *strict, *arguments], capture_output=True, text=True, timeout=300, **settings
    )
    deprecations = deprecations_in(done.stderr)
    if done.returncode or deprecations:
        pytest.fail("\n".join([*deprecations, done.stderr[-3000:]]))
    return done
