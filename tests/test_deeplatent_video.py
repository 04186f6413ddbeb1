"""Videos: the model needs nothing extra for them; the processor needs torchvision."""

import pytest
import torch
from conftest import encode, picture, stock_twin, user_turn
from helpers import GREEDY, open_at, step_logits
from torch.testing import assert_close


pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def video(tokenizer, shared_model) -> dict:
    """Two temporal slices of 4 x 4 patches, then a picture of 2 x 4 patches, then words."""
    config, generator = shared_model.config, torch.Generator().manual_seed(4)
    start, end = config.vision_start_token_id, config.vision_end_token_id
    words = tokenizer("what moves?")["input_ids"]
    ids = [start, *[config.video_token_id] * 8, end, start, *[config.image_token_id] * 2, end, *words]
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values_videos": torch.randn(32, 1176, generator=generator),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "second_per_grid_ts": torch.tensor([0.5]),
        "pixel_values": torch.randn(8, 1176, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2, 4]]),
    }


def test_zero_blocks_over_a_video_is_the_backbone(shared_model, video):
    config = shared_model.config
    types = (video["input_ids"] == config.image_token_id).int() + 2 * (
        video["input_ids"] == config.video_token_id
    ).int()
    inner = [config.latent_start_token_id, config.latent_pad_token_id, config.latent_end_token_id]
    stock = stock_twin(shared_model).generate(**video, mm_token_type_ids=types, suppress_tokens=inner, **GREEDY)
    ours = shared_model.generate(**video, max_latent_blocks=0, **GREEDY)
    assert_close(step_logits(ours), step_logits(stock), atol=1e-5, rtol=1e-5)


def test_blocks_look_at_every_slice_of_a_video(shared_model, video):
    settings = GREEDY | {"logits_processor": open_at(shared_model, video, [[1]]), "output_latents": True}
    output = shared_model.generate(**video, **settings)
    (step,) = output.latent_trace.steps
    assert step.image_grids == [(2, 2), (2, 2), (1, 2)]  # two slices, then the picture behind them
    assert step.image_attention.shape[1] == 10
    later = dict(video) | {
        "pixel_values_videos": torch.cat([video["pixel_values_videos"][:16], torch.zeros(16, 1176)])
    }
    changed = shared_model.generate(**later, **settings).latent_trace.steps[0]
    assert (changed.latents - step.latents).abs().max() > 1e-3
    forced = shared_model(**(video | {"input_ids": output.sequences[:, :-1]}), latent_grid_hw=output.latent_grid_hw)
    length = video["input_ids"].shape[1]
    assert_close(forced.logits[:, length - 1 :], step_logits(output), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", ["only new", "all"])
def test_a_cache_is_continued_with_another_video(shared_model, video, given):
    """Each video keeps its own seconds per slice."""
    first = shared_model.generate(**video, max_latent_blocks=0, **GREEDY)
    config = shared_model.config
    turn = [config.vision_start_token_id, *[config.video_token_id] * 4, config.vision_end_token_id, *range(40, 52)]
    ids = torch.cat([first.sequences, torch.tensor([turn])], dim=1)
    new = {
        "pixel_values_videos": torch.randn(16, 1176),
        "video_grid_thw": torch.tensor([[2, 2, 4]]),
        "second_per_grid_ts": torch.tensor([1.0]),
    }
    both = {name: torch.cat([video[name], new[name]]) for name in new}
    pictures = {name: video[name] for name in ("pixel_values", "image_grid_thw")}
    vision = new if given == "only new" else both | pictures
    settings = GREEDY | {"min_latent_blocks": 1, "max_latent_blocks": 1}
    second = shared_model.generate(ids, past_key_values=first.past_key_values, **vision, **settings)
    forced = shared_model(second.sequences[:, :-1], **both, **pictures, latent_grid_hw=second.latent_grid_hw)
    assert_close(forced.logits[:, ids.shape[1] - 1 :], step_logits(second), atol=1e-5, rtol=1e-5)


def test_the_processor_takes_videos_where_torchvision_is(processor, shared_model):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    frames = torch.stack([torch.full((3, 56, 56), value, dtype=torch.uint8) for value in (0, 60, 120, 180)])
    conversation = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what moves?"}]}]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = processor(text=[text], videos=[frames], return_tensors="pt")
    output = shared_model.generate(**inputs, min_latent_blocks=1, max_latent_blocks=1, **GREEDY)
    assert output.num_latent_blocks.tolist() == [1]


def test_pictures_and_videos_keep_their_order_across_rows(shared_model, processor, video, rows):
    """A row with a video beside a row with a picture: features go to the rows they belong to."""
    other = encode(processor, [user_turn("what colour?", picture(56, 84, 1))])
    length = max(video["input_ids"].shape[1], other["input_ids"].shape[1])
    ids = torch.full((2, length), processor.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, source in enumerate((video["input_ids"], other["input_ids"])):
        ids[row, -source.shape[1] :], mask[row, -source.shape[1] :] = source[0], 1
    both = dict(video) | {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.cat([video["pixel_values"], other["pixel_values"]]),
        "image_grid_thw": torch.cat([video["image_grid_thw"], other["image_grid_thw"]]),
    }
    output = shared_model.generate(**both, logits_processor=open_at(shared_model, both, [[1], [0]]), **GREEDY)
    for row, (inputs, plan) in enumerate(((video, [[1]]), (other, [[0]]))):
        alone = shared_model.generate(**inputs, logits_processor=open_at(shared_model, inputs, plan), **GREEDY)
        assert_close(step_logits(output)[row], step_logits(alone)[0], atol=1e-5, rtol=1e-5)
