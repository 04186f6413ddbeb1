"""Image reconstruction (LaRe, eq. 7): from a step's latents alone, the part of the image that it looked at.

    x_0     = scale * VAE(the step's window, cut from the picture that the tower saw, 256 x 256 pixels)
    x_t     = sqrt(a_t) * x_0 + sqrt(1 - a_t) * noise        linear schedule, 1e-4 to 0.02 in 1000 steps
    L_image = mean over steps of (U-Net(x_t, t, latents of the step) - noise)^2

The U-Net is `diffusers`' at the paper's size, 132.9M parameters. Its table gives `attention_head_dim = 64`, which
`diffusers` reads as 64 heads of 3 to 8 numbers. Here heads are 64 wide (as many as fit: 3 and 6), which is what the name
says; the parameters are equally many either way.

Shapes: B rows, N steps, K latents of a step, W windows of a step, D hidden size, C channels of a code, S side of a code.
"""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn


CONDITION_SIZE = 768
HEAD_SIZE = 64
CHANNELS = (96, 192, 384, 512)
CODE_CHANNELS = 16  # KL-16
GROUPS = 32


def build_unet(channels: tuple[int, ...] = CHANNELS, code_size: int = 16, code_channels: int = CODE_CHANNELS):
    """The paper's U-Net (its table 7); smaller `channels` for small experiments."""
    groups = min(GROUPS, *channels)
    if any(size % groups for size in channels):
        raise ValueError(f"The channels of the U-Net must be multiples of {groups}, got {channels}.")
    heads = tuple(max(1, size // HEAD_SIZE) for size in channels)
    return UNet2DConditionModel(
        sample_size=code_size,
        in_channels=code_channels,
        out_channels=code_channels,
        layers_per_block=3,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=CONDITION_SIZE,
        attention_head_dim=tuple(size if size % count else count for size, count in zip(channels, heads)),
        norm_num_groups=groups,
    )


def build_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False
    )


def load_vae(path: str, code_channels: int = CODE_CHANNELS, crop_size: int = 256) -> AutoencoderKL:
    """Read a frozen image tokenizer.

    Raises:
        ValueError: its codes are not as wide as the U-Net takes, or too small for it.
    """
    vae = AutoencoderKL.from_pretrained(path).requires_grad_(False).eval()
    found = vae.config.latent_channels
    if found != code_channels:
        raise ValueError(f"The VAE at {path} gives codes of {found} channels, but the U-Net takes {code_channels}.")
    factor = reduction_of(vae)
    if crop_size % factor or (crop_size // factor) % 8:
        raise ValueError(
            f"`crop_size` ({crop_size}) must be a multiple of {8 * factor}: the VAE at {path} reduces {factor}-fold, the U-Net 8-fold."
        )
    return vae


def reduction_of(vae: AutoencoderKL) -> int:
    """Pixels along the side of one number of a code."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def crop_windows(pixels: Tensor, numbers: Tensor, top: Tensor, left: Tensor, side: int, patch: int) -> Tensor:
    """Cut windows out of pictures: (M, 3, side * patch, side * patch).

    Args:
        pixels: (pictures, 3, H, W).
        numbers: (M,) the picture of each window.
        top, left: (M,) in tokens.
        side: of a window, in tokens; `patch` pixels each.
    """
    offsets = torch.arange(side * patch, device=pixels.device)
    rows = (top * patch)[:, None] + offsets
    columns = (left * patch)[:, None] + offsets
    return pixels[numbers[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class ImageReconstruction(nn.Module):
    """The U-Net and its condition. The VAE is frozen and lives outside, so that no checkpoint holds it.

    Args:
        hidden_size: of the latents.
        image_mean, image_std: that the image processor normalised with.
    """

    def __init__(
        self, hidden_size: int, vae: AutoencoderKL, image_mean, image_std, channels=CHANNELS, crop_size: int = 256
    ):
        super().__init__()
        self.crop_size = crop_size
        self._vae = (vae,)  # a tuple hides it from `state_dict` and `parameters`
        self.unet = build_unet(tuple(channels), crop_size // reduction_of(vae), vae.config.latent_channels)
        self.condition = nn.Linear(hidden_size, CONDITION_SIZE)
        self.scheduler = build_scheduler()
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    @property
    def vae(self) -> AutoencoderKL:
        return self._vae[0]

    @torch.no_grad()
    def encode(self, crops: Tensor) -> Tensor:
        """Codes of normalised crops (M, 3, h, w): (M, C, S, S) float32."""
        mean, std = (
            torch.tensor(values, device=crops.device)[:, None, None] for values in (self.image_mean, self.image_std)
        )
        unit = (crops.float() * std + mean).clamp(0, 1)
        unit = nn.functional.interpolate(unit, (self.crop_size, self.crop_size), mode="bilinear", antialias=True)
        self._vae = (self.vae.to(crops.device),)
        codes = self.vae.encode((2 * unit - 1).to(self.vae.dtype)).latent_dist.mode()
        return codes.float() * self.vae.config.scaling_factor

    def forward(self, latents: Tensor, crops: Tensor) -> Tensor:
        """Eq. 7 per window, (M,): latents (M, K, D) against what they should give back, (M, 3, h, w)."""
        code = self.encode(crops)
        noise = torch.randn_like(code)
        times = torch.randint(self.scheduler.config.num_train_timesteps, (len(code),), device=code.device)
        noisy = self.scheduler.add_noise(code, noise, times)
        condition = self.condition(latents.to(self.condition.weight.dtype))
        predicted = self.unet(noisy.to(condition.dtype), times, encoder_hidden_states=condition).sample
        return (predicted.float() - noise).square().mean(dim=(1, 2, 3))

    @torch.no_grad()
    def sample(self, latents: Tensor, num_steps: int = 50, generator: torch.Generator | None = None) -> Tensor:
        """Draw what latents (M, K, D) show, from noise: pictures (M, 3, crop_size, crop_size) within 0 and 1."""
        scheduler, size = build_scheduler(), self.unet.config.sample_size
        scheduler.set_timesteps(num_steps)
        condition = self.condition(latents.to(self.condition.weight.dtype))
        shape = (len(latents), self.unet.config.in_channels, size, size)
        code = torch.randn(shape, generator=generator).to(condition)
        for time in scheduler.timesteps:
            predicted = self.unet(code, time, encoder_hidden_states=condition).sample
            code = scheduler.step(predicted, time, code, generator=generator).prev_sample
        self._vae = (self.vae.to(code.device),)
        picture = self.vae.decode((code / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        return (picture.float() / 2 + 0.5).clamp(0, 1)
