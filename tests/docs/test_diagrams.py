"""The diagram of docs/concepts.md shows the positions and the mask that the model uses."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

import modeling_latentvlm  # noqa: F401 - registers the classes
import processing_latentvlm  # noqa: F401
from docs.diagrams import draw, lay_out


ROOT = Path(__file__).resolve().parents[2]
GRID = (2, 3)


def test_the_committed_diagram_is_what_the_script_draws():
    assert (ROOT / "docs/block.svg").read_text(encoding="utf-8") == draw(lay_out())


@pytest.fixture(scope="module")
def shipped():
    path = ROOT / "checkpoints/deeplatent"
    return AutoModel.from_pretrained(path, dtype="float32").eval(), AutoProcessor.from_pretrained(path)


@pytest.fixture
def batch(shipped):
    question = [{"type": "image", "image": Image.new("RGB", (112, 112))}, {"type": "text", "text": "What color?"}]
    answer = [{"type": "latent", "grid": list(GRID)}, {"type": "text", "text": "red"}]
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return shipped[1].apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")


def read_passes(model, batch, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, S) positions and (S, D) last states of all columns that the language model reads for one row."""
    positions, states = [], []
    decoder = model.model.language_model
    hooks = [
        decoder.register_forward_pre_hook(
            lambda _, args, kw: positions.append(kw["position_ids"][-3:, 0]), with_kwargs=True
        ),
        decoder.register_forward_hook(lambda _, args, output: states.append(output.last_hidden_state[0])),
    ]
    with torch.no_grad():
        model(**batch, **arguments)
    for hook in hooks:
        hook.remove()
    return torch.cat(positions, dim=1), torch.cat(states)


def test_positions_are_those_of_the_model(shipped, batch):
    found = read_passes(shipped[0], batch)[0]
    drawn = lay_out(image=(4, 4), block=GRID)
    block = torch.tensor([one.position for one in drawn if one.kind in ("marker", "control", "latent")]).T
    start = int((batch["input_ids"][0] == shipped[0].config.latent_start_token_id).nonzero())
    wanted = block - block[0, 0] + found[0, start]
    assert torch.equal(found[:, start : start + block.shape[1]], wanted)
    image = torch.tensor([one.position for one in drawn if one.kind == "image"]).T
    first = int((batch["input_ids"][0] == shipped[0].config.image_token_id).nonzero()[0])
    assert torch.equal(found[:, first : first + 16], image - image[0, 0] + found[0, first])


def test_a_column_attends_to_itself_and_to_earlier_ones(shipped, batch):
    """A changed latent changes its own column and the later ones, and no earlier one, also within its block."""

    def change(latents, step):
        return torch.cat([latents[:3], latents[3:4] + 1, latents[4:]])

    before, after = (read_passes(shipped[0], batch, **more)[1] for more in ({}, {"latent_intervention": change}))
    start = int((batch["input_ids"][0] == shipped[0].config.latent_start_token_id).nonzero())
    changed = (before - after).abs().amax(dim=-1) > 1e-4
    place = start + 4 + 3  # behind <latent> and three controls, the fourth latent
    assert not changed[:place].any() and changed[place:].all()
