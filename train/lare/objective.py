"""The objective of LaRe's stages (eq. 9-10): L = L_ntp + w_align L_align + w_image L_image + w_text L_text.

Rows of the batch come from `LaReCollator`. A term whose weight is zero has no module. Stage 1 takes no steps, so it has the
first term alone.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from configuration_latentvlm.latent_architecture import changed_fields
from train.common.training_model import StepPart
from train.lare.alignment import Alignment, pool
from train.lare.image_reconstruction import ImageReconstruction, crop_windows, load_vae
from train.lare.text_reconstruction import text_prefix_loss, word_loss


@dataclass
class LatentLossArguments:
    """What teaches latents to mean something; the weights are systems.md's choice, the paper's are lost."""

    align_loss_weight: float = field(default=0.1, metadata={"help": "w_align; 0 leaves the term out."})
    image_loss_weight: float = field(default=1.0, metadata={"help": "w_image; 0 leaves the term out."})
    text_loss_weight: float = field(default=0.5, metadata={"help": "w_text; 0 leaves the term out."})
    word_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a term for curricula (not the paper's): the last latent of a step lies in the direction of the embedding "
            "of the first word of the reasoning step that it stands for."
        },
    )
    text_prefix_length: int = field(default=32, metadata={"help": "Tokens of the reasoning to give back, 1 to 128."})
    vae_path: str | None = field(default=None, metadata={"help": "Folder of the KL-16 image tokenizer (diffusers)."})
    crop_size: int = field(default=256, metadata={"help": "Sides of the enlarged window in pixels."})
    unet_channels: list[int] = field(
        default_factory=lambda: [96, 192, 384, 512], metadata={"help": "Of the U-Net; the paper's by default."}
    )
    code_channels: int = field(default=16, metadata={"help": "Channels of the image tokenizer's codes."})
    hidden_windows: float = field(
        default=0.0,
        metadata={
            "help": "Share of refocusing steps, in training, whose window the Extractor does not see: it has to rely on the states "
            "of the language model, and these have to know what is looked at."
        },
    )

    def __post_init__(self):
        for name in ("align_loss_weight", "image_loss_weight", "text_loss_weight", "word_loss_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be >= 0 and finite, got {getattr(self, name)}.")
        if not 0 <= self.hidden_windows <= 1:
            raise ValueError(f"`hidden_windows` must be within 0 and 1, got {self.hidden_windows}.")
        if not 1 <= self.text_prefix_length <= 128:
            raise ValueError(f"`text_prefix_length` must be within 1 and 128, got {self.text_prefix_length}.")
        if len(self.unet_channels) != 4:
            raise ValueError(f"`unet_channels` must be four numbers, got {self.unet_channels}.")


class DelimiterRows(nn.Module):
    """The two trained rows of the embedding, `<bot>` and `<eot>`, while the rest of it is frozen (stage 2).

    They are weights of the objective, so that the optimizer holds two rows and not a vocabulary; a checkpoint has them in
    the embedding. There they are copied at every forward, so that a tied output layer follows (without a gradient: these
    tokens are never targets), and a run that goes on from a checkpoint is the run that was killed.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        embedding = model.get_input_embeddings()
        self.ids = [model.config.bot_token_id, model.config.eot_token_id]
        self.rows = nn.Parameter(embedding.weight.detach()[self.ids].float().clone())
        embedding.register_forward_hook(self.replace)

    def replace(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        ids = args[0]
        module.weight.data[self.ids] = self.rows.detach().to(module.weight)
        for token, row in zip(self.ids, self.rows):
            output = torch.where((ids == token)[..., None], row.to(output.dtype), output)
        return output

    def fold(self, state: dict[str, Tensor], prefix: str, embedding: str) -> dict[str, Tensor]:
        """Move the rows from where the objective has them to where a checkpoint has them."""
        state = dict(state)
        rows = state.pop(f"{prefix}rows")
        for weight in [weight for name, weight in state.items() if name.endswith(embedding)]:
            folded = weight.clone()
            folded[self.ids] = rows.to(folded)
            is_same = [name for name, value in state.items() if value.data_ptr() == weight.data_ptr()]
            state |= dict.fromkeys(is_same, folded)  # a tied output layer stays tied
        return state


class LaReObjective(nn.Module):
    """The terms of a stage, and the modules that only they need.

    Args:
        model: the `LaReForCausalLM` that is trained, with the weights that it starts from.
        image_processor: the model's.
        has_latents: whether steps are taken at all.
        trains_delimiters: whether `<bot>` and `<eot>` train in a frozen embedding.
    """

    def __init__(
        self,
        model: nn.Module,
        image_processor,
        arguments: LatentLossArguments,
        has_latents: bool,
        trains_delimiters: bool,
    ):
        super().__init__()
        config, self.arguments, self.has_latents = model.config, arguments, has_latents
        size = config.get_text_config().hidden_size
        self.cache = None  # a `TowerCache`, where batches hold numbers of pictures
        self.alignment = self.image_reconstruction = self.delimiters = None
        if not has_latents:
            return
        if arguments.hidden_windows:
            hide_windows(model, arguments.hidden_windows)
        if arguments.align_loss_weight:
            self.alignment = Alignment(size)
        if arguments.image_loss_weight:
            if arguments.vae_path is None:
                raise ValueError("`image_loss_weight` needs a `vae_path`; 0 leaves the image reconstruction out.")
            self.image_reconstruction = ImageReconstruction(
                size,
                load_vae(arguments.vae_path, arguments.code_channels, arguments.crop_size),
                image_processor.image_mean,
                image_processor.image_std,
                arguments.unet_channels,
                arguments.crop_size,
            )
        if trains_delimiters:
            self.delimiters = DelimiterRows(model)

    @property
    def sees_whole_step(self) -> bool:
        """Whether a micro-batch has to know the others of its optimizer step: then `forward` is given a `part`."""
        return self.alignment is not None

    def forward(
        self, model: nn.Module, part: StepPart | None = None, image_numbers: Tensor | None = None, **batch
    ) -> dict:
        """`loss`, `logits`, and the terms by name, detached, as `losses`.

        Args:
            part: which part of an optimizer step the batch is. While `part.others` are not known yet, only what they will
                be of the other parts is computed, as `rows`.
            image_numbers: of the batch's pictures in `cache`, in place of their pixels.
            batch: of `LaReCollator`; a curriculum adds `num_refocus_steps`, by default the model's.
        """
        shown = nullcontext() if image_numbers is None else self.cache.showing(image_numbers)
        drawn = nullcontext() if part is None else part.random_state(batch["input_ids"].device)
        with shown, drawn:
            return self.compute(model, part, **batch)

    def compute(
        self,
        model: nn.Module,
        part: StepPart | None,
        reasoning_ids: Tensor | None = None,
        reasoning_mask: Tensor | None = None,
        reasoning_keys: Tensor | None = None,
        image_keys: Tensor | None = None,
        num_refocus_steps: int | None = None,
        step_words: Tensor | None = None,
        **inputs,
    ) -> dict:
        if num_refocus_steps == 0 or not self.has_latents:
            return self.compute_plain(model, part, inputs)
        fields = {} if num_refocus_steps is None else {"num_refocus_steps": num_refocus_steps}
        with changed_fields(model.config, **fields):
            output = model(**inputs, output_latents=True)
        model = base_of(model)
        terms, weights, counts = {"ntp_loss": output.loss}, {"ntp_loss": 1.0}, {}
        arguments = self.arguments
        if self.alignment is not None:
            states = reasoning_states(model, reasoning_ids, reasoning_mask)
            text = (pool(states, reasoning_mask), reasoning_mask.any(1), reasoning_keys)
            image = (*pooled_images(model, inputs["input_ids"], output), image_keys)
            latents, targets = pool(*flat_latents(output)), {"text": text, "image": image}
            if part is not None and part.others is None:
                return {"rows": self.alignment.rows(latents, targets)}
            terms["align_loss"], left_out = self.alignment(latents, targets, part and part.others)
            weights["align_loss"] = arguments.align_loss_weight
            counts["align_without_negative"] = output.loss.new_tensor(left_out)
        if self.image_reconstruction is not None:
            terms["image_loss"] = self.image_loss(model, output, inputs)
            weights["image_loss"] = arguments.image_loss_weight
        if arguments.text_loss_weight:
            length = arguments.text_prefix_length
            terms["text_loss"] = text_prefix_loss(
                model, *flat_latents(output), reasoning_ids[:, :length], reasoning_mask[:, :length]
            )
            weights["text_loss"] = arguments.text_loss_weight
        if arguments.word_loss_weight:
            terms["word_loss"] = word_loss(model, output.latents, output.latent_mask, step_words)
            weights["word_loss"] = arguments.word_loss_weight
        loss = sum(weights[name] * term.to(output.loss.device) for name, term in terms.items())
        loss = loss + untouched_projector(model, inputs)
        losses = {name: term.detach() for name, term in terms.items()} | counts
        return {"loss": loss, "logits": output.logits, "losses": losses}

    def compute_plain(self, model: nn.Module, part: StepPart | None, inputs: dict) -> dict:
        """The next-token loss of the plain model, without refocusing steps."""
        if self.alignment is not None and part is not None and part.others is None:
            return {"rows": {}}  # without latents nothing has to be known of the other parts
        with changed_fields(model.config, **model.config.limit_latents(0)[0]):
            output = model(**inputs, use_cache=False)  # gradient checkpointing would fill a cache twice
        loss = output.loss + untouched_projector(base_of(model), inputs)
        if self.has_latents:  # in other batches of the run
            extractor = base_of(model).refocus
            loss = loss + touch(self) + (0.0 if extractor is None else touch(extractor))
        return {"loss": loss, "logits": output.logits, "losses": {"ntp_loss": output.loss.detach()}}

    def image_loss(self, model: nn.Module, output, inputs: dict) -> Tensor:
        """Mean of eq. 7 over the steps that rows took with an image before them; one that comes later they did not see."""
        seeing = {step.row for step in output.latent_trace.steps if step.image_grids}
        rows = torch.tensor(
            [row in seeing for row in range(len(output.latent_mask))], device=output.latent_mask.device
        )
        exists = output.latent_mask & rows[:, None]
        if not bool(exists.any()):
            return touch(self.image_reconstruction)
        latents, crops, rows = window_crops(model, output, inputs, exists)
        losses = self.image_reconstruction(latents[rows], crops)
        return losses.mean()

    folded = ("delimiters.",)  # of its own state, what a checkpoint keeps in the model

    def fold_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint keeps of the whole state: rows that were trained here go to the embedding."""
        if self.delimiters is None:
            return state
        return self.delimiters.fold(state, "objective.delimiters.", "language_model.embed_tokens.weight")

    def unfold_state(self, model: nn.Module) -> None:
        """Take the rows from a model that was just loaded."""
        if self.delimiters is not None:
            with torch.no_grad():
                self.delimiters.rows.copy_(model.get_input_embeddings().weight[self.delimiters.ids])


def hide_windows(model: nn.Module, share: float) -> None:
    """In training, let the Extractor see no image tokens at a share of all refocusing steps, drawn by row and step.

    Which window is chosen has no gradient. Where its content alone makes the latents, nothing teaches the language model's
    attention to find the right one: on pointer chasing the second window stayed at the right tile in 60 % of the rows.

    Raises:
        ValueError: the model has no Extractor.
    """
    if model.refocus is None:
        raise ValueError(
            "`hidden_windows` hides windows from the Extractor, which this model has not (`use_extractor`)."
        )

    def hide(module: nn.Module, args: tuple) -> tuple | None:
        if not module.training:
            return None
        states, visual, attended, *others = args
        is_shown = torch.rand(len(attended), 1, device=attended.device) >= share
        return states, visual, attended & is_shown, *others

    model.refocus.register_forward_pre_hook(hide)


def base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def touch(module: nn.Module) -> Tensor:
    """Zero that depends on every weight: a batch that does not use them must still have, and on every rank, their gradients."""
    return 0.0 * sum(parameter.float().sum() for parameter in module.parameters())


def untouched_projector(model: nn.Module, inputs: dict) -> Tensor | float:
    """Where no row has an image: in stage 1 nothing else trains."""
    return touch(model.model.multi_modal_projector) if "pixel_values" not in inputs else 0.0


@torch.no_grad()
def reasoning_states(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, T, D) last hidden states of the reasoning alone."""
    embeds = model.get_input_embeddings()(ids)
    return model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False
    ).last_hidden_state.detach()


def flat_latents(output) -> tuple[Tensor, Tensor]:
    """All latents of a row in a line: (B, N * K, D), and which exist."""
    count = output.latents.shape[2]
    return output.latents.flatten(1, 2), output.latent_mask.repeat_interleave(count, dim=1)


def images_per_row(model: nn.Module, input_ids: Tensor) -> Tensor:  # (B,)
    return (input_ids == model.config.image_token_id).sum(dim=1) // model.config.image_seq_length


def pooled_images(model: nn.Module, input_ids: Tensor, output) -> tuple[Tensor, Tensor]:
    """The features of the images that every row's latents saw, pooled, (B, 2D); and whether they saw any."""
    counts = images_per_row(model, input_ids)
    seen = torch.zeros_like(counts)
    for step in output.latent_trace.steps:
        seen[step.row] = len(step.image_grids)
    size = model.config.get_text_config().hidden_size
    if output.image_hidden_states is None:
        return output.latents.new_zeros(len(counts), 2 * size, dtype=torch.float32), seen > 0
    features = output.image_hidden_states.detach()
    most, tokens = int(counts.max()), features.shape[1]
    padded = features.new_zeros(len(counts), most * tokens, size)
    places = torch.arange(most * tokens, device=features.device)
    padded[places < (counts * tokens).to(features.device)[:, None]] = features.flatten(0, 1)
    return pool(padded, places < (seen * tokens).to(features.device)[:, None]), seen > 0


def window_crops(model: nn.Module, output, inputs: dict, exists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of the steps that exist (M, K, D), crops of all their windows, and which of the steps each crop is of."""
    config, pixels = model.config, inputs["pixel_values"].to(exists.device)
    counts = images_per_row(model, inputs["input_ids"]).to(exists.device)
    first = counts.cumsum(0) - counts
    side, windows = config.window_size, output.windows
    if windows is None:  # every step looks at all of the row's first image
        side, windows = config.image_grid_size, exists.new_zeros(*exists.shape, 1, 3, dtype=torch.long)
    steps = exists.nonzero()  # (M, 2) row and step
    chosen = windows[exists]  # (M, W, 3)
    number = torch.arange(len(chosen), device=exists.device)[:, None].expand(chosen.shape[:2])
    is_there = chosen[..., 0] >= 0
    chosen, number = chosen[is_there], number[is_there]
    pictures = first[steps[number, 0]] + chosen[:, 0]
    patch = config.vision_config.patch_size
    crops = crop_windows(pixels, pictures, chosen[:, 1], chosen[:, 2], side, patch)
    return output.latents[exists], crops, number
