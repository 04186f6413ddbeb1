"""LaRe's objective: every term against its formula written naively, and where its gradients go."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers import assert_near, enable_checkpointing
from test_lare import ADAPTIVE, BOT, DECODERS, EOT, IMAGE, PAD, build, prompt

from train.common.training_model import StepPart, map_tensors
from train.lare.alignment import Alignment, find_contrasts, pool, symmetric_info_nce
from train.lare.image_reconstruction import ImageReconstruction, build_unet, crop_windows, load_vae
from train.lare.objective import LaReObjective, LatentLossArguments, pooled_images
from train.lare.text_reconstruction import text_prefix_loss


SCALE = 0.2325
PROCESSOR = SimpleNamespace(image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28])
SMALL = {"crop_size": 32, "unet_channels": [8, 8, 16, 16]}


def write_vae(folder, channels: int = 16, blocks: int = 3):
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=SCALE,
        mid_block_add_attention=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(params=DECODERS)
def decoder(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory) -> str:
    return str(write_vae(tmp_path_factory.mktemp("vae")))


@pytest.fixture
def reconstruction(vae_path) -> ImageReconstruction:
    torch.manual_seed(3)
    vae = load_vae(vae_path, crop_size=32)
    return ImageReconstruction(64, vae, PROCESSOR.image_mean, PROCESSOR.image_std, (8, 8, 16, 16), 32)


@pytest.fixture
def objective_of(vae_path):
    def make(model, has_latents=True, trains_delimiters=False, **fields) -> LaReObjective:
        torch.manual_seed(4)
        arguments = LatentLossArguments(vae_path=vae_path, **(SMALL | fields))
        return LaReObjective(model, PROCESSOR, arguments, has_latents, trains_delimiters)

    return make


# Rows of unequal length: one image and two answers, none, two images and the longest answer.
ROWS = [
    (prompt([5, 6], "image", [7, 8, 9]), [30, 31, 32], [50, 51, 52, 53]),
    (prompt([20, 21, 22, 23]), [33, 34], [54, 55]),
    (prompt([10], "image", [11, 12], "image", [13, 14]), [35, 36, 37, 38, 39], [56, 57, 58, 59, 60, 61]),
]


def batch_of(rows: list = ROWS, seed: int = 0) -> dict:
    """As `LaReCollator` makes it, padded on the right."""

    def padded(values: list[list[int]], by: int) -> torch.Tensor:
        width = max(map(len, values))
        return torch.tensor([row + [by] * (width - len(row)) for row in values])

    images = sum(question.count(IMAGE) for question, _, _ in rows) // 16
    batch = {
        "input_ids": padded([question + answer for question, answer, _ in rows], PAD),
        "attention_mask": padded([[1] * len(question + answer) for question, answer, _ in rows], 0),
        "labels": padded([[-100] * len(question) + answer for question, answer, _ in rows], -100),
        "reasoning_ids": padded([reasoning or [PAD] for _, _, reasoning in rows], PAD),
        "reasoning_mask": padded([[1] * len(reasoning) or [0] for _, _, reasoning in rows], 0).bool(),
        "reasoning_keys": torch.tensor([hash(tuple(reasoning)) for _, _, reasoning in rows]),
        "image_keys": torch.arange(len(rows)),
    }
    if images:
        batch["pixel_values"] = torch.randn(images, 3, 56, 56, generator=torch.Generator().manual_seed(seed))
    return batch


def inputs_of(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if not name.startswith("reasoning") and name != "image_keys"}


# Alignment


def naive_info_nce(first, second, exists, keys, temperature) -> torch.Tensor:
    """Row by row, with the negatives written out."""
    rows, total = [row for row in range(len(first)) if exists[row]], torch.zeros(())
    pairs = [row for row in rows if any(keys[other] != keys[row] for other in rows)]
    for row in pairs:
        others = [other for other in rows if other == row or keys[other] != keys[row]]
        for one, many in ((first, second), (second, first)):
            scores = torch.stack([one[row] @ many[other] / temperature for other in others])
            total = total - (scores[others.index(row)] - scores.logsumexp(0))
    return total / (2 * max(len(pairs), 1))


def random_pairs(rows: int = 7, size: int = 5):
    first, second = F.normalize(torch.randn(2, rows, size), dim=-1).unbind()
    return first.requires_grad_(), second.requires_grad_()


@pytest.mark.parametrize(
    "exists, keys",
    [
        ([1, 1, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6]),
        ([1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 3, 3, 3, 6]),
        ([1, 0, 1, 1, 0, 1, 1], [0, 1, 0, 3, 4, 3, 6]),
        ([0, 0, 0, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6]),
        ([1, 1, 0, 1, 0, 0, 1], [4, 4, 4, 4, 4, 4, 4]),  # no row has a negative
        ([1, 1, 1, 0, 0, 0, 0], [2, 2, 2, 3, 4, 5, 6]),  # those with another key do not exist
    ],
)
def test_info_nce_equals_a_naive_loop(exists, keys):
    exists, keys = torch.tensor(exists).bool(), torch.tensor(keys)
    first, second = random_pairs()
    loss, naive = (function(first, second, exists, keys, 0.3) for function in (symmetric_info_nce, naive_info_nce))
    assert_near(loss, naive, 1e-6)
    counts = find_contrasts(exists, keys)[1]
    if counts.any():
        for one, other in zip(*(torch.autograd.grad(value, [first, second]) for value in (loss, naive))):
            assert_near(one, other, 1e-6)
            assert (one[~counts] == 0).all() and bool((one[counts] != 0).any(dim=1).all())


def test_no_pair_at_all_is_zero_with_gradients():
    first, second = random_pairs()
    loss = symmetric_info_nce(first, second, torch.zeros(7).bool(), torch.zeros(7).long())
    loss.backward()
    assert loss == 0 and (first.grad == 0).all()


def test_pool_counts_what_exists():
    states = torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()
    pooled = pool(states, mask)
    for row in (0, 1):
        chosen = states[row][mask[row]]
        assert_near(pooled[row], torch.cat([chosen.mean(0), chosen.max(0).values]))
    assert (pooled[2] == 0).all()


def test_targets_get_no_gradient_and_heads_do():
    alignment = Alignment(4)
    latents, text, image = (torch.randn(3, 8, requires_grad=True) for _ in range(3))
    exists, keys = torch.ones(3).bool(), torch.arange(3)
    alignment(latents, {"text": (text, exists, keys), "image": (image, exists, keys)})[0].backward()
    assert text.grad is None and image.grad is None and bool((latents.grad != 0).any())
    assert all(bool((parameter.grad != 0).any()) for parameter in alignment.parameters())


RANK = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from train.lare.alignment import Alignment

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.upstream, self.alignment = torch.nn.Linear(6, 8), Alignment(4)

    def forward(self, values, targets):
        self.latents = self.upstream(values)
        self.latents.retain_grad()
        return self.alignment(self.latents, targets)[0]

data = torch.load(f"{folder}/data.pt", weights_only=True)
net = Net()
net.load_state_dict(data["net"])
cut = slice(3 * rank, 3 * rank + 3)
targets = {kind: tuple(value[cut] for value in values) for kind, values in data["targets"].items()}
parallel = DistributedDataParallel(net)
loss = parallel(data["values"][cut], targets)
loss.backward()
with torch.no_grad():
    frozen, _ = net.alignment(net.latents.detach(), targets)  # as in evaluation: gathered without gradients
grads = {name: parameter.grad for name, parameter in net.named_parameters()}
torch.save({"loss": loss.detach(), "eval": frozen, "latents": net.latents.grad, "grads": grads}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    """Duplicates across the processes, and a row without a target in each kind."""
    net = torch.nn.ModuleDict({"upstream": torch.nn.Linear(6, 8), "alignment": Alignment(4)})
    values = torch.randn(6, 6)
    targets = {
        "text": (torch.randn(6, 8), torch.tensor([1, 1, 1, 1, 0, 1]).bool(), torch.tensor([0, 1, 2, 1, 4, 5])),
        "image": (torch.randn(6, 8), torch.tensor([1, 0, 1, 1, 1, 1]).bool(), torch.tensor([0, 1, 2, 3, 0, 2])),
    }
    torch.save({"net": net.state_dict(), "values": values, "targets": targets}, tmp_path / "data.pt")
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", RANK, str(rank), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    latents = net["upstream"](values)
    latents.retain_grad()
    loss, _ = net["alignment"](latents, targets)
    loss.backward()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for one in found:
        assert_near(one["loss"], loss.detach(), 1e-6)
        assert_near(one["eval"], loss.detach(), 1e-6)
        for name, parameter in net.named_parameters():
            assert bool((parameter.grad != 0).any())
            assert_near(one["grads"][name], parameter.grad, 1e-6)
    # Every process sums the gradients of both losses; DDP halves them at the weights.
    assert_near(torch.cat([one["latents"] for one in found]) / 2, latents.grad, 1e-6)


MORE_ROWS = [*ROWS, (prompt("image", [62]), [40], [50, 51, 52, 53]), (prompt("image", [9, 8]), [41], [])]


def run_in_parts(model, objective, rows: list[list]) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The losses of micro-batches of one step, and the gradients that accumulation gives."""
    batches = [batch_of(some, seed=number) for number, some in enumerate(rows)]
    for number, batch in enumerate(batches):
        batch["image_keys"] = batch["image_keys"] + 10 * number
    parts = [StepPart(seed) for seed in range(len(rows))]
    ahead = [
        map_tensors(torch.Tensor.detach, objective(model, part=part, **batch).get("rows", {}))
        for part, batch in zip(parts, batches)
    ]
    model.zero_grad(), objective.zero_grad()
    losses = []
    for number, (part, batch) in enumerate(zip(parts, batches)):
        part.others = ahead[:number] + ahead[number + 1 :]
        output = objective(model, part=part, **batch)
        (output["loss"] / len(rows)).backward()
        losses.append(output["losses"])
    named = [*model.named_parameters(), *objective.named_parameters()]
    return losses, {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


@pytest.mark.parametrize("cut", [[1, 1, 1, 1, 1], [2, 3], [3, 1, 1]], ids=str)
def test_accumulated_alignment_equals_one_batch_of_all_rows(objective_of, cut):
    """Loss and gradients, one row a micro-batch included; a duplicate, rows without image and one without a reasoning."""
    model = build("qwen2")
    options = {"image_loss_weight": 0.0, "text_loss_weight": 0.0}
    starts = [sum(cut[:number]) for number in range(len(cut))]
    rows = [MORE_ROWS[start : start + count] for start, count in zip(starts, cut)]

    def gradients_of_alignment(run):
        """What the term adds to those of the same run without it."""
        aligned, plain = (
            objective_of(model, align_loss_weight=1.0, **options),
            objective_of(model, align_loss_weight=0.0, **options),
        )
        (losses, grads), (_, without) = run(aligned), run(plain)
        return losses, {name: grad - without.get(name, 0) for name, grad in grads.items()}

    def whole(objective):
        batch = batch_of(MORE_ROWS)
        batch["pixel_values"] = torch.cat(
            [
                batch_of(some, seed=number).get("pixel_values", torch.zeros(0, 3, 56, 56))
                for number, some in enumerate(rows)
            ]
        )
        model.zero_grad(), objective.zero_grad()
        output = objective(model, **batch)
        output["loss"].backward()
        named = [*model.named_parameters(), *objective.named_parameters()]
        return output["losses"], {
            name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None
        }

    expected, wanted = gradients_of_alignment(whole)
    losses, grads = gradients_of_alignment(lambda objective: run_in_parts(model, objective, rows))
    assert expected["align_loss"] > 1 and expected["align_without_negative"] == 0
    for one in losses:
        assert_near(one["align_loss"], expected["align_loss"])
    assert grads.keys() == wanted.keys() and any("refocus" in name for name in wanted)
    moved = [name for name, grad in wanted.items() if grad.abs().max() > 1e-4]
    assert len(moved) > 20 and {"alignment.image_head.weight", "alignment.latent_head.bias"} <= set(moved)
    for name, grad in wanted.items():
        assert_near(grads[name], grad, 1e-5 * max(1.0, float(grad.abs().max())))


def test_both_passes_have_the_same_random_state(objective_of):
    """With dropout: the rows that are learned from are those that the others were told of, so all see one loss."""
    model = build("qwen2").train()
    for module in model.model.language_model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    objective = objective_of(model, image_loss_weight=0.0, text_loss_weight=0.0)
    state = torch.get_rng_state()
    losses, _ = run_in_parts(model, objective, [[row] for row in MORE_ROWS])
    assert torch.equal(torch.get_rng_state(), state)  # whatever is drawn later does not depend on it
    again, _ = run_in_parts(model.eval(), objective, [[row] for row in MORE_ROWS])
    assert abs(losses[0]["align_loss"] - again[0]["align_loss"]) > 1e-3  # dropout acts
    for one in losses[1:]:
        assert_near(one["align_loss"], losses[0]["align_loss"], 1e-6)
    model.train()
    rows = [objective(model, part=StepPart(seed), **batch_of())["rows"]["latents"] for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1]) and (rows[0] - rows[2]).abs().max() > 1e-3  # not the same noise in every part


def test_rows_without_a_negative_are_counted(objective_of):
    objective = objective_of(build(), image_loss_weight=0.0, text_loss_weight=0.0)
    with torch.no_grad():
        losses = objective(build(), **batch_of(ROWS[:1]))["losses"]
    assert losses["align_loss"] == 0 and losses["align_without_negative"] == 2  # its text and its image


# Image reconstruction


def test_crops_are_slices_of_their_pictures():
    pixels = torch.randn(3, 3, 56, 56)
    places = [(0, 0, 0), (2, 2, 2), (1, 0, 2), (1, 2, 0), (2, 1, 1), (0, 2, 2), (0, 1, 0)]
    numbers, top, left = torch.tensor(places).T
    crops = crop_windows(pixels, numbers, top, left, side=2, patch=14)
    assert crops.shape == (7, 3, 28, 28)
    for crop, (number, row, column) in zip(crops, places):
        assert torch.equal(crop, pixels[number, :, row * 14 : row * 14 + 28, column * 14 : column * 14 + 28])


def test_a_code_is_that_of_the_enlarged_picture(reconstruction):
    """From what the tower got back to the pixels of the picture, enlarged, and as the VAE takes it."""
    picture = torch.rand(2, 3, 28, 28)
    mean, std = (torch.tensor(values)[:, None, None] for values in (PROCESSOR.image_mean, PROCESSOR.image_std))
    code = reconstruction.encode((picture - mean) / std)
    enlarged = F.interpolate(picture, (32, 32), mode="bilinear", antialias=True)
    expected = SCALE * reconstruction.vae.encode(enlarged * 2 - 1).latent_dist.mean
    assert code.shape == (2, 16, 8, 8) and not code.requires_grad
    assert_near(code, expected)


def test_denoising_equals_the_formula(reconstruction):
    latents, crops = torch.randn(5, 2, 64), torch.randn(5, 3, 28, 28)
    torch.manual_seed(11)
    losses = reconstruction(latents, crops)
    torch.manual_seed(11)
    code = reconstruction.encode(crops)
    noise, times = torch.randn_like(code), torch.randint(1000, (5,))
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[times]
    condition = latents @ reconstruction.condition.weight.T + reconstruction.condition.bias
    for row in range(5):
        noisy = kept[row].sqrt() * code[row] + (1 - kept[row]).sqrt() * noise[row]
        predicted = reconstruction.unet(noisy[None], times[row], condition[row : row + 1]).sample
        assert_near(losses[row], (predicted[0] - noise[row]).pow(2).mean())


def test_the_paper_s_u_net_has_132_9_million_parameters():
    with torch.device("meta"):
        ours = build_unet()
        literal = UNet2DConditionModel.from_config(
            {**ours.config, "attention_head_dim": 64}
        )  # as `diffusers` reads it
    counts = [sum(parameter.numel() for parameter in unet.parameters()) for unet in (ours, literal)]
    assert [round(count / 1e6, 1) for count in counts] == [132.9, 132.9]
    config = ours.config
    assert (config.sample_size, config.in_channels, config.layers_per_block) == (16, 16, 3)
    assert (config.block_out_channels, config.norm_num_groups) == ((96, 192, 384, 512), 32)

    def heads(unet):
        return [block.attentions[0].transformer_blocks[0].attn1.heads for block in unet.down_blocks[1:3]]

    assert heads(ours) == [3, 6] and heads(literal) == [64, 64]  # 64 wide, or 64 many


def test_gradients_reach_latents_condition_and_u_net_but_never_the_vae(reconstruction):
    latents = torch.randn(2, 3, 64, requires_grad=True)
    reconstruction(latents, torch.randn(2, 3, 28, 28)).sum().backward()
    assert bool((latents.grad != 0).any())
    for name, parameter in reconstruction.named_parameters():
        assert bool((parameter.grad != 0).any()), name
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in reconstruction.vae.parameters())
    assert {name.split(".")[0] for name in reconstruction.state_dict()} == {"unet", "condition"}
    reconstruction.train()
    assert not reconstruction.vae.training


def test_other_latents_another_loss(reconstruction):
    crops, losses = torch.randn(2, 3, 28, 28), []
    for seed in (1, 2):
        latents = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(0)
        losses.append(reconstruction(latents, crops))
    assert bool((losses[0] != losses[1]).all())


def test_a_vae_that_does_not_fit_is_refused(tmp_path, vae_path):
    narrow = write_vae(tmp_path / "narrow", channels=4)
    with pytest.raises(ValueError, match=r"narrow gives codes of 4 channels, but the U-Net takes 16"):
        load_vae(str(narrow))
    load_vae(str(narrow), code_channels=4)
    for size in (33, 48, 36):
        with pytest.raises(ValueError, match=rf"`crop_size` \({size}\) must be a multiple of 32"):
            load_vae(vae_path, crop_size=size)
    with pytest.raises(ValueError, match="channels of the U-Net must be multiples of 8"):
        build_unet((8, 12, 16, 16))


def test_samples_are_pictures_and_follow_their_generator(reconstruction):
    latents = torch.randn(2, 3, 64)

    def draw(seed, latents=latents):
        return reconstruction.sample(latents, num_steps=3, generator=torch.Generator().manual_seed(seed))

    pictures = draw(1)
    assert pictures.shape == (2, 3, 32, 32) and not pictures.requires_grad
    assert 0 <= pictures.min() < pictures.max() <= 1
    assert torch.equal(pictures, draw(1))
    assert not torch.equal(pictures, draw(2)) and not torch.equal(pictures, draw(1, -latents))


def test_samples_follow_the_denoising_chain(reconstruction, monkeypatch):
    """A U-Net that knows the noise leads back to the code, and the VAE undoes the scaling."""
    code = torch.randn(1, 16, 8, 8)
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)

    def predict(noisy, time, encoder_hidden_states):
        return SimpleNamespace(sample=(noisy - kept[time].sqrt() * code) / (1 - kept[time]).sqrt())

    monkeypatch.setattr(reconstruction.unet, "forward", predict)
    picture = reconstruction.sample(torch.randn(1, 2, 64), 20, torch.Generator().manual_seed(0))
    expected = reconstruction.vae.decode(code / SCALE).sample / 2 + 0.5
    assert_near(picture, expected.clamp(0, 1), 1e-3)


# Text reconstruction


def naive_text_loss(model, latents, latent_mask, reasoning: list[list[int]], length: int) -> torch.Tensor:
    """Every row by itself, with no padding."""
    embed, losses = model.get_input_embeddings(), []
    for row, tokens in enumerate(reasoning):
        tokens = tokens[:length]
        if not tokens:
            continue
        ids = torch.tensor(tokens)
        kept = latents[row][latent_mask[row]]
        embeds = torch.cat([embed(torch.tensor([BOT])), kept, embed(torch.tensor([EOT])), embed(ids)])
        hidden = model.model.language_model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]
        losses.append(F.cross_entropy(model.lm_head(hidden[len(kept) + 1 : -1]), ids))
    return torch.stack(losses).mean()


REASONING = [[50, 51, 52, 53], [54, 55], [], [56, 57, 58, 59, 60, 61]]


def text_inputs():
    latents = torch.randn(4, 5, 64, requires_grad=True)
    exists = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    prefix = torch.tensor([row + [PAD] * (6 - len(row)) for row in REASONING])
    return latents, exists, prefix, torch.tensor([[1] * len(row) + [0] * (6 - len(row)) for row in REASONING]).bool()


def test_text_loss_equals_every_row_alone(decoder):
    model = build(decoder)
    latents, exists, prefix, mask = text_inputs()
    loss = text_prefix_loss(model, latents, exists, prefix, mask)
    naive = naive_text_loss(model, latents, exists, REASONING, 6)
    assert_near(loss, naive)
    (ours,), (theirs,) = (torch.autograd.grad(value, [latents]) for value in (loss, naive))
    assert_near(ours, theirs)
    assert (ours[2] == 0).all() and (ours[1, 2:] == 0).all() and bool((ours[0] != 0).all())


def test_a_text_forward_starts_at_position_zero_without_a_cache(decoder, monkeypatch):
    """RoPE is relative, so a loss alone would not show where counting starts."""
    model, calls = build(decoder), []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    latents, exists, prefix, mask = text_inputs()
    text_prefix_loss(model, latents, exists, prefix, mask)
    assert len(calls) == 1 and calls[0]["use_cache"] is False and calls[0].get("past_key_values") is None
    for row in range(4):
        attended = calls[0]["attention_mask"][row].bool()
        assert int(attended.sum()) == 2 + int(exists[row].sum()) + len(REASONING[row])
        assert calls[0]["position_ids"][row][attended].tolist() == list(range(int(attended.sum())))


def test_no_reasoning_at_all_is_zero(decoder):
    latents, exists, prefix, mask = text_inputs()
    loss = text_prefix_loss(build(decoder), latents, exists, prefix, torch.zeros_like(mask))
    loss.backward()
    assert loss == 0 and (latents.grad == 0).all()


def test_gradients_of_the_text_loss(decoder):
    model = build(decoder)
    latents, exists, prefix, mask = text_inputs()
    text_prefix_loss(model, latents, exists, prefix, mask).backward()
    grad = model.get_input_embeddings().weight.grad
    moved = (grad != 0).any(dim=1).nonzero().flatten().tolist()
    assert {BOT, EOT} <= set(moved)
    # The first tokens of the reasoning; the last is predicted and never read.
    assert {50, 51, 52, 54, 56, 60} <= set(moved) and not {53, 55, 61, PAD, IMAGE} & set(moved)
    for name, parameter in model.named_parameters():
        is_used = "language_model" in name or name == "lm_head.weight"
        assert (parameter.grad is not None and bool((parameter.grad != 0).any())) == is_used, name


def test_with_the_latents_held_neither_image_nor_question_changes_the_text_loss(decoder, objective_of):
    """The proof that nothing but the latents reaches it, through the whole objective and bit for bit."""
    model = build(decoder)
    objective = objective_of(model, image_loss_weight=0.0)
    held = torch.randn(3, 3, 3, 64, generator=torch.Generator().manual_seed(5))

    def losses(rows, seed=0, latents=held):
        batch = batch_of(rows, seed)
        return objective(model, latent_intervention=lambda _, step: latents[step.row, step.index], **batch)["losses"]

    with torch.no_grad():
        first = losses(ROWS)
        another_image = losses(ROWS, seed=9)
        asked = [(prompt([70], "image", [71] * 9), *ROWS[0][1:]), (prompt("image", [72]), *ROWS[1][1:]), ROWS[2]]
        another_question = losses(asked)
        other_latents = losses(ROWS, latents=held.flip(0))
    for other in (another_image, another_question):
        assert torch.equal(first["text_loss"], other["text_loss"])
        assert first["ntp_loss"] != other["ntp_loss"]
    assert (first["text_loss"] - other_latents["text_loss"]).abs() > 1e-3


# The whole


WINDOWS = {
    "one": {},
    "two": {"num_windows": 2},
    "all": {"use_window": False},
    "adaptive": ADAPTIVE,
    "pooled": {"latent_tokens_per_step": 2},
}


@pytest.mark.parametrize("kind", list(WINDOWS))
def test_every_step_is_held_to_the_windows_that_it_looked_at(kind, objective_of, monkeypatch):
    model = build("qwen2", **WINDOWS[kind])
    objective, seen = objective_of(model), []

    def spy(latents, crops):
        seen.append((latents, crops))
        return crops.flatten(1).mean(1) + latents.sum()

    monkeypatch.setattr(objective.image_reconstruction, "forward", spy)
    batch = batch_of()
    with torch.no_grad():
        losses = objective(model, **batch)["losses"]
        trace = model(**inputs_of(batch), output_latents=True).latent_trace
    ((latents, crops),) = seen
    first = [0, None, 1]  # picture of each row
    expected = []
    for step in trace.steps:
        if step.row == 1:
            continue  # it has no image
        for window in step.windows or [(0, 0, 0, 4, 4)]:
            image, top, left, height, width = window
            picture = batch["pixel_values"][first[step.row] + image]
            crop = picture[:, top * 14 : (top + height) * 14, left * 14 : (left + width) * 14]
            expected.append((step.latents, crop))
    if kind == "adaptive":
        counts = [len(trace.row(row)) for row in range(3)]
        assert len(set(counts)) > 1
    assert len(expected) == len(crops) >= 2 * len(trace.row(0)) * WINDOWS[kind].get("num_windows", 1) - 5
    for one, crop, (step_latents, step_crop) in zip(latents, crops, expected, strict=True):
        assert_near(one, step_latents, 1e-6)
        assert torch.equal(crop, step_crop)
    assert_near(losses["image_loss"], (crops.flatten(1).mean(1) + latents.sum()).mean(), 1e-5)


@pytest.mark.parametrize("fields", [{}, ADAPTIVE])
def test_alignment_takes_all_latents_and_states_of_text_and_images_alone(fields, objective_of):
    """The targets anew, row by row; rows without image and duplicates included."""
    model = build("qwen2", **fields)
    rows = [*ROWS, (prompt("image", [62]), [40], [50, 51, 52, 53])]  # the reasoning of the first row
    batch = batch_of(rows)
    objective = objective_of(model, image_loss_weight=0.0, text_loss_weight=0.0)

    def pooled(states):
        return torch.cat([states.mean(0), states.max(0).values])

    with torch.no_grad():
        loss = objective(model, **batch)["losses"]["align_loss"]
        trace = model(**inputs_of(batch), output_latents=True).latent_trace
        features = model.model.get_image_features(batch["pixel_values"]).pooler_output
        latents = [pooled(torch.cat([step.latents for step in trace.row(row)])) for row in range(4)]
        texts = []
        for _, _, reasoning in rows:
            embeds = model.get_input_embeddings()(torch.tensor([reasoning]))
            texts.append(pooled(model.model.language_model(inputs_embeds=embeds).last_hidden_state[0]))
        images = [pooled(features[0]), torch.zeros(128), pooled(torch.cat([*features[1:3]])), pooled(features[3])]
        heads = objective.alignment
        first, text, image = (
            F.normalize(torch.stack(values) @ head.weight.T + head.bias, dim=-1)
            for values, head in ((latents, heads.latent_head), (texts, heads.text_head), (images, heads.image_head))
        )
        expected = naive_info_nce(first, text, [True] * 4, [0, 1, 2, 0], 0.07)
        expected = expected + naive_info_nce(first, image, [True, False, True, True], [0, 1, 2, 3], 0.07)
    assert_near(loss, expected, 1e-4)


@pytest.mark.parametrize("fields", [{}, ADAPTIVE, {"use_extractor": False}])
def test_the_sum_has_the_weights_of_the_arguments(fields, objective_of, decoder):
    model = build(decoder, **fields)
    weights = {"align": 0.3, "image": 0.7, "text": 0.9}
    objective = objective_of(model, **{f"{name}_loss_weight": value for name, value in weights.items()})
    output = objective(model, **batch_of())
    losses = output["losses"]
    assert set(losses) == {"ntp_loss", "align_loss", "image_loss", "text_loss", "align_without_negative"}
    assert losses.pop("align_without_negative") == 0
    assert all(bool(value > 0) and not value.requires_grad for value in losses.values())
    expected = losses["ntp_loss"] + sum(weights[name] * losses[f"{name}_loss"] for name in weights)
    assert_near(output["loss"], expected)
    plain = model(**inputs_of(batch_of()))
    assert_near(losses["ntp_loss"], plain.loss)
    assert_near(output["logits"], plain.logits)
    output["loss"].backward()
    for name, parameter in [*model.named_parameters(), *objective.named_parameters()]:
        if "vision_tower" not in name:
            assert bool((parameter.grad != 0).any()), name


def test_the_text_term_takes_the_asked_prefix(objective_of):
    model, batch = build(), batch_of()
    with torch.no_grad():
        output = model(**inputs_of(batch), output_latents=True)
        latents, exists = output.latents.flatten(1, 2), output.latent_mask.repeat_interleave(3, dim=1)
        for length in (2, 3, 128):
            loss = objective_of(model, image_loss_weight=0.0, text_prefix_length=length)(model, **batch)["losses"]
            naive = naive_text_loss(model, latents, exists, [row[2] for row in ROWS], length)
            assert_near(loss["text_loss"], naive)


def test_a_term_that_is_off_has_no_module(objective_of):
    model = build()
    modules = {"align": "alignment", "image": "image_reconstruction", "text": None}
    for off, module in modules.items():
        objective = objective_of(model, **{f"{off}_loss_weight": 0.0})
        with torch.no_grad():
            losses = objective(model, **batch_of())["losses"]
        counts = {"align_without_negative"} - {f"{off}_without_negative"}
        assert set(losses) == counts | {"ntp_loss", *(f"{name}_loss" for name in modules if name != off)}
        if module is not None:
            assert getattr(objective, module) is None
            assert not any(name.startswith(module) for name in objective.state_dict())
    nothing = objective_of(model, align_loss_weight=0.0, image_loss_weight=0.0, text_loss_weight=0.0)
    assert not nothing.state_dict() and nothing(model, **batch_of())["losses"].keys() == {"ntp_loss"}
    arguments = LatentLossArguments(image_loss_weight=0.0)  # so it needs no VAE
    assert LaReObjective(model, PROCESSOR, arguments, True, False).image_reconstruction is None
    with pytest.raises(ValueError, match="`image_loss_weight` needs a `vae_path`"):
        LaReObjective(model, PROCESSOR, LatentLossArguments(), True, False)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"align_loss_weight": -0.1}, "`align_loss_weight` must be >= 0"),
        ({"text_loss_weight": float("nan")}, "`text_loss_weight` must be >= 0"),
        ({"image_loss_weight": float("inf")}, "`image_loss_weight` must be >= 0"),
        ({"text_prefix_length": 0}, "`text_prefix_length` must be within 1 and 128, got 0"),
        ({"text_prefix_length": 129}, "`text_prefix_length` must be within 1 and 128, got 129"),
        ({"unet_channels": [8, 8, 8]}, "`unet_channels` must be four numbers"),
    ],
)
def test_wrong_arguments_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LatentLossArguments(**fields)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("fields", [{}, ADAPTIVE])
def test_stage_one_takes_no_steps_and_keeps_the_config(fields, is_checkpointed, objective_of):
    model, batch = build(**fields), batch_of()
    plain = build(num_refocus_steps=0)
    before = model.config.to_dict()
    objective = objective_of(model, has_latents=False)
    assert not list(objective.parameters())
    if is_checkpointed:
        enable_checkpointing(model, {"use_reentrant": False})
    model.train()
    for one in (model, plain):
        one.requires_grad_(False)
        one.model.multi_modal_projector.requires_grad_(True)
    output = objective(model, **batch)
    assert output["losses"].keys() == {"ntp_loss"} and model.config.to_dict() == before
    expected = plain(**inputs_of(batch))
    assert_near(output["loss"], expected.loss)
    output["loss"].backward()
    expected.loss.backward()
    assert model.config.to_dict() == before
    for one, other in zip(
        model.model.multi_modal_projector.parameters(), plain.model.multi_modal_projector.parameters()
    ):
        assert bool((one.grad != 0).any())
        assert_near(one.grad, other.grad)
    with pytest.raises(ValueError):
        objective(model, **(batch | {"pixel_values": batch["pixel_values"][:1]}))
    assert model.config.to_dict() == before  # after an error too


@pytest.mark.parametrize("stage", [1, 2, 4])
def test_a_batch_without_images_gives_every_trained_weight_a_gradient(stage, objective_of):
    """DDP waits for every weight, and in stage 1 nothing but the projector could have one."""
    model = build()
    objective = objective_of(model, has_latents=stage > 1, trains_delimiters=stage == 2)
    trained = {1: "model.multi_modal_projector", 2: "refocus", 4: ("model.l", "model.m", "lm_head", "refocus")}[stage]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    batch = batch_of([ROWS[1], ([24, 25], [41], [62])])
    assert "pixel_values" not in batch
    output = objective(model, **batch)
    assert torch.isfinite(output["loss"]) and output["losses"].get("image_loss", 0) == 0
    output["loss"].backward()
    for name, parameter in [*model.named_parameters(), *objective.named_parameters()]:
        if parameter.requires_grad:
            assert parameter.grad is not None, name
    assert all(
        (parameter.grad == 0).all() for parameter in model.model.multi_modal_projector.parameters() if stage == 1
    )


@pytest.mark.parametrize("fields", [{}, {"use_window": False}])
def test_an_image_behind_the_latents_is_none_that_they_should_give_back(fields, objective_of):
    """A conversation whose picture comes with the second question."""
    model = build(**fields)
    objective = objective_of(model)
    batch = batch_of([(prompt([20, 21, 33, 34], "image"), [35, 36], [54])])
    batch["labels"][0, 2:4] = torch.tensor([33, 34])  # the first answer
    assert objective(model, **batch)["losses"]["image_loss"] == 0
    output = model(**inputs_of(batch), output_latents=True)
    assert not pooled_images(model, batch["input_ids"], output)[1].any()


def test_rows_of_the_delimiters_replace_those_of_the_embedding(objective_of):
    model = build()
    frozen = model.requires_grad_(False).get_input_embeddings().weight.clone()
    model.refocus.requires_grad_(True)
    objective, batch = objective_of(model, trains_delimiters=True), batch_of()
    assert torch.equal(objective.delimiters.rows, frozen[[BOT, EOT]])
    before = objective_of(build())(build(), **batch)["losses"]
    torch.manual_seed(0)
    same = objective(model, **batch)["losses"]
    assert_near(same["ntp_loss"], before["ntp_loss"])
    with torch.no_grad():
        objective.delimiters.rows += 0.1 * torch.randn(2, 64)
    other = build()
    with torch.no_grad():
        other.get_input_embeddings().weight[[BOT, EOT]] = objective.delimiters.rows
    expected = other(**inputs_of(batch))
    output = objective(model, **batch)
    assert_near(output["losses"]["ntp_loss"], expected.loss)
    assert (expected.loss - before["ntp_loss"]).abs() > 1e-4
    expected.loss.backward()
    (grad,) = torch.autograd.grad(model(**inputs_of(batch)).loss, [objective.delimiters.rows])
    assert_near(grad, other.get_input_embeddings().weight.grad[[BOT, EOT]])
    output["loss"].backward()
    assert bool((objective.delimiters.rows.grad != 0).any(dim=1).all())
