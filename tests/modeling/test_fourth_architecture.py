"""A fourth architecture on the machinery of blocks: all that it takes, held to DeepLatent's autoregressive mode."""

import torch
from huggingface_hub.dataclasses import strict
from same_numbers_models import (
    ANSWERS,
    GREEDY,
    QWEN_PROMPTS,
    QWEN_SIZES,
    build_deeplatent,
    qwen_batch,
    qwen_pixels,
    trained,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.generation import GenerationMixin

from modeling_latentvlm.backbone_calls import guard_backbone
from modeling_latentvlm.block_latents import BlockLatents
from modeling_latentvlm.decoding_autoregressive import AutoregressiveLatents
from modeling_latentvlm.modeling_blocks import LatentBlocksMixin


@strict
class EchoConfig(Qwen2_5_VLConfig):
    """Three tokens of a block, how many latents it has, and how many blocks an answer may open."""

    model_type = "echo"

    latent_start_token_id: int = 304
    latent_pad_token_id: int = 305
    latent_end_token_id: int = 306
    num_autoregressive_latents: int = 3
    max_latent_blocks: int = 5


class EchoForConditionalGeneration(LatentBlocksMixin, Qwen2_5_VLForConditionalGeneration, GenerationMixin):
    """Qwen2.5-VL whose latents are its own last hidden states."""

    config_class = EchoConfig

    def __init__(self, config: EchoConfig):
        super().__init__(config)
        guard_backbone(self)
        self.post_init()

    @property
    def block_latents(self) -> BlockLatents:
        return AutoregressiveLatents(self)


def build_echo() -> tuple[EchoForConditionalGeneration, torch.nn.Module]:
    """The new model, and DeepLatent with the same weights."""
    twin = build_deeplatent(latent_mode="autoregressive")
    fields = twin.config.to_dict()
    names = (*EchoConfig.__annotations__, "text_config", "vision_config", "image_token_id", "video_token_id")
    names += ("vision_start_token_id", "vision_end_token_id")
    model = EchoForConditionalGeneration(EchoConfig(**{name: fields[name] for name in names})).eval()
    missing, unexpected = model.load_state_dict(twin.state_dict(), strict=False)
    assert not missing and all(name.startswith(("latent_control.", "latent_blocks.")) for name in unexpected)
    return model, twin


def test_it_answers_as_deeplatent_does():
    model, twin = build_echo()
    settings = GREEDY | {"output_latents": True, "min_latent_blocks": 2, "max_latent_blocks": 2}
    ours, theirs = (one.generate(**qwen_batch(), **settings) for one in (model, twin))
    assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))
    assert ours.num_latent_blocks.tolist() == [2, 2, 0] and torch.equal(ours.latent_grid_hw, theirs.latent_grid_hw)
    plain = model.generate(**qwen_batch(), **GREEDY, max_latent_blocks=0)
    assert not torch.equal(torch.stack(plain.logits), torch.stack(ours.logits))


def test_it_learns_as_deeplatent_does():
    model, twin = build_echo()
    answers = [[30, 304, 31, *ANSWERS[0]], [40, 304, 305, 305, 306, 41], ANSWERS[2]]
    rows = trained(QWEN_PROMPTS, answers, (305, 306)) | qwen_pixels(QWEN_SIZES)
    rows |= {"latent_grid_hw": torch.tensor([[1, 3], [1, 2]])}
    for one in (model, twin):
        one.train()(**rows).loss.backward()
    others = dict(twin.named_parameters())
    assert all(torch.equal(weight.grad, others[name].grad) for name, weight in model.named_parameters())
