"""DeepLatent: parallel latent visual reasoning on a Qwen2.5-VL backbone.

Paper: DeepLatent: Think with Images via Parallel Latent Visual Reasoning

The model writes text. When it emits `<latent>`, decoding pauses and one block of image-grounded latents is built in
parallel; the whole block enters the language model in one forward pass and text goes on:

    h_s, h_q, h_v = decoder(.. <latent> e_s e_q e_v)[-3:]
    z_1 .. z_N    = latent_blocks(h_s, h_q, h_v, image features)        `latent_former_deeplatent.py`, eq. 2-4
    logits        = decoder(z_1 .. z_N </latent>)[-1]

From outside that is one decoding step: `<latent>` goes in, the logits after `</latent>` come out, so the decoding loops of
transformers (greedy, sampling, beams) work unchanged. Without blocks the model *is* the backbone; a test holds it to that. `forward` builds
blocks that stand in `input_ids` (a training sample, an earlier answer) by the same code that `generate` runs.

Rotary positions: `<latent>` and the controls take one each; with p the next, z at (i, j) takes (p, p + i, p + j), as an
image of h x w merged patches would, and `</latent>` takes p + max(h, w).

Shapes: B rows, S new tokens, N latents of a block, D hidden size, G largest grid side.
"""

from .transformers_contract import check_contract


check_contract("deeplatent")  # before the imports below: what they miss is said here


from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from .configuration_deeplatent import DeepLatentConfig
from .backbone_calls import guard_backbone
from .block_latents import BlockLatents
from .decoding_autoregressive import AutoregressiveLatents
from .decoding_blocks import DecodedBlocks
from .decoding_deeplatent import DeepLatentContext, ParallelLatents, collect_scales, scale_loss
from .generation_deeplatent import DeepLatentGenerationMixin
from .latent_former_deeplatent import LatentBlockBuilder, initialize_latent_module
from .modeling_blocks import BlockCausalLMOutputWithPast, LatentBlocksMixin
from .qwen_inputs import rename_hub_weights
from .sharded_layers import keep_present_layers


# Out-of-tree classes do not inherit the key renames of their parent: without these every decoder weight of a stock
# checkpoint would stay random, with no more than a log line.
register_checkpoint_conversion_mapping(
    DeepLatentConfig.model_type,
    get_checkpoint_conversion_mapping("Qwen2_5_VLForConditionalGeneration"),
    overwrite=True,
)


@dataclass
class DeepLatentCausalLMOutputWithPast(BlockCausalLMOutputWithPast):
    """`BlockCausalLMOutputWithPast` with what the scale head says.

    Args:
        scale_loss (`torch.FloatTensor` scalar, *optional*): L_scale (eq. 7), already in `loss` with its weight.
        scale_logits (`tuple[torch.FloatTensor]`, *optional*): height and width logits, each `(num_blocks, G)`.
    """

    scale_loss: torch.FloatTensor | None = None
    scale_logits: tuple[torch.FloatTensor] | None = None


class DeepLatentForConditionalGeneration(
    DeepLatentGenerationMixin, LatentBlocksMixin, Qwen2_5_VLForConditionalGeneration, GenerationMixin
):
    """Qwen2.5-VL that can open blocks of parallel, image-grounded latents in the middle of its text."""

    config: DeepLatentConfig
    config_class = DeepLatentConfig
    output_class = DeepLatentCausalLMOutputWithPast
    # Kept in float32: few weights, which all latents come from. Quantizers skip them, and so does float16, which overflows
    # where bfloat16 does not.
    _keep_in_fp32_modules = ["latent_control", "latent_blocks"]
    _no_split_modules = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock", "LatentBlockBuilder"]

    def __init__(self, config: DeepLatentConfig):
        super().__init__(config)
        self.latent_control = nn.Embedding(3, config.get_text_config().hidden_size)  # e_s, e_q, e_v
        self.latent_blocks = LatentBlockBuilder(config)
        guard_backbone(self)
        self.register_load_state_dict_pre_hook(rename_hub_weights)
        self.post_init()
        keep_present_layers(self)

    def _init_weights(self, module: nn.Module) -> None:
        if not initialize_latent_module(module, self.config.latent_query_rms):
            super()._init_weights(module)

    @property
    def block_latents(self) -> BlockLatents:
        is_parallel = self.config.latent_mode == "parallel"
        return ParallelLatents(self) if is_parallel else AutoregressiveLatents(self)

    @property
    def _block_modules(self) -> list[nn.Module]:
        return [self.latent_control, self.latent_blocks]

    def _new_context(self, **fields) -> DeepLatentContext:
        return DeepLatentContext(noise=self.training, **fields)

    def _score_blocks(self, decoded: DecodedBlocks, has_loss: bool) -> tuple[Tensor | None, dict]:
        logits = collect_scales(decoded.blocks, self.config)
        loss = scale_loss(logits, decoded.blocks) if has_loss and logits is not None else None
        weighted = None if loss is None else self.config.scale_loss_weight * loss  # eq. 8
        return weighted, {"scale_logits": logits, "scale_loss": loss}


__all__ = ["DeepLatentForConditionalGeneration"]
