"""What learns in reinforcement learning, what is frozen, and what it is held against."""

import copy
from dataclasses import dataclass, field

from torch import nn

from configuration_latentvlm.transformers_contract import check_contract
from train.data.reasoning_data import ReasoningSample
from train.deeplatent.rl.grpo_trainer import MODULATION
from train.deeplatent.rl.objective import ObjectiveArguments
from train.train_vedas import LORA_TARGETS


@dataclass
class AdapterArguments:
    """LoRA in place of full fine-tuning. The reference is then the policy without its adapters, and takes no memory."""

    lora: bool = field(
        default=False, metadata={"help": "Adapters on the language model; the modulation trains in full."}
    )
    lora_r: int = field(default=64, metadata={"help": "Rank."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale; alpha / r multiplies the adapter."})


def trained_names(model, arguments: ObjectiveArguments) -> tuple[str, ...]:
    """Prefixes of what learns; the vision tower, Q, the scale head and e_* never do."""
    names = ("model.language_model.", "lm_head.")
    if arguments.variant == "joint":
        names += tuple(f"latent_blocks.{part}." for part in MODULATION)
    if arguments.train_latent_former:
        names += ("latent_blocks.layers.", "latent_blocks.image_index.")
    return names


def check_policy(model, arguments: ObjectiveArguments, data: list[ReasoningSample]) -> None:
    """Raise where there would be no latent to learn from."""
    config = model.config
    if not any(sample.images for sample in data):
        raise ValueError("No sample has an image, but latents are made of images.")
    if arguments.variant != "joint":
        return
    if config.latent_mode != "parallel" or not (config.modulate_queries or config.modulate_images):
        raise ValueError(
            "`variant='joint'` needs a modulation to learn, but the checkpoint has `latent_mode` "
            f"{config.latent_mode!r}, `modulate_queries` {config.modulate_queries}, `modulate_images` "
            f"{config.modulate_images}: use `variant='text'`."
        )


def prepare_policy(model, arguments: ObjectiveArguments, adapters: AdapterArguments, in_16_bits: bool):
    """Freeze what does not learn; return the policy and its reference (None: the policy without its adapters)."""
    names = trained_names(model, arguments)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(names))
    model.latent_blocks.float()  # small, and read by densities that 16 bits would drown
    reference = None
    if adapters.lora:
        model = add_adapters(model, names, adapters)
    elif arguments.kl_weight:
        # All but the vision tower, which is frozen in both.
        visual = model.model.visual
        reference = copy.deepcopy(model, {id(visual): visual}).requires_grad_(False).eval()
    if in_16_bits:
        # Small updates are lost in 16 bits; autocast computes in them anyway.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        # What decides the width of the residual stream, so that both compute one function before the first update.
        for name, parameter in reference.named_parameters() if reference is not None else ():
            if parameter.ndim == 1 or "embed_tokens" in name:
                parameter.data = parameter.data.float()
    return model, reference


def add_adapters(model: nn.Module, names: tuple[str, ...], adapters: AdapterArguments):
    """Wrap a model in adapters; what trains of the latent module trains whole."""
    from peft import LoraConfig, get_peft_model

    check_contract("adapters")
    whole = [name.removesuffix(".") for name in names if name.startswith("latent_blocks.")]
    if "latent_blocks.layers" in whole:  # a list cannot be wrapped, its layers can
        whole.remove("latent_blocks.layers")
        whole += [f"latent_blocks.layers.{number}" for number in range(len(model.latent_blocks.layers))]
    return get_peft_model(
        model,
        LoraConfig(
            r=adapters.lora_r,
            lora_alpha=adapters.lora_alpha,
            lora_dropout=0.0,  # old and new log-probabilities must come from one function
            target_modules=LORA_TARGETS,
            modules_to_save=whole or None,
        ),
    )
