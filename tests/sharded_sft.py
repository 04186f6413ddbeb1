"""One of the processes of `test_train_deeplatent.py`: SFT 2 with sharded weights against the same in one process.

python tests/sharded_sft.py RANK WORLD_SIZE STORE
"""

import sys

import torch
import torch.distributed as dist
from conftest import CHAT_TEMPLATE, build_model, build_tokenizer, picture, user_turn
from helpers import assert_near, enable_checkpointing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from processing_latentvlm import DeepLatentProcessor
from processing_latentvlm.processing_deeplatent import LATENT_TOKENS
from train.common.training_model import TrainingModel
from train.deeplatent.collator import DeepLatentCollator
from train.deeplatent.distillation import SftObjective


LAYERS = (1, 3)


def sample(question: str, images: int, *grids: tuple[int, int]) -> dict:
    """Blocks of the given grids, with a word before each."""
    content = [{"type": "text", "text": "so"}]
    for number, (height, width) in enumerate(grids):
        content += [
            {"type": "text", "text": f"look {number}"},
            {"type": "image", "image": picture(28 * width, 28 * height, number)},
        ]
    asked = user_turn(question, *(picture(56, 84, 9 + number) for number in range(images)))
    return {
        "messages": [*asked, {"role": "assistant", "content": [*content, {"type": "text", "text": "red"}]}],
        "origin": "x",
        "number": 0,
    }


def batches_of(processor, config) -> list[list[dict]]:
    """By case, a batch of either process: other numbers of blocks, of images, and of latents."""
    collate = DeepLatentCollator(processor, config, "latent")
    nothing, plain = sample("hello", 0), sample("what?", 1)
    one, three = sample("which of both?", 2, (2, 3)), sample("where?", 1, (1, 1), (4, 2), (2, 2))
    cases = [
        [[plain], [three]],
        [[nothing], [one, three, plain]],
        [[three], [nothing, nothing]],
        [[nothing], [plain]],
        [[one], [three]],
        [[nothing], [nothing]],
    ]
    found = []
    for case in cases:
        found.append([collate(samples) for samples in case])
        for batch in found[-1]:
            grids = batch.get("latent_grid_hw")
            if grids is not None:
                states = torch.randn(
                    len(LAYERS), int(grids.prod(1).sum()), 64, generator=torch.Generator().manual_seed(3)
                )
                batch["teacher_states"] = states
    return found


def build(tokenizer, mode: str, checkpointing: bool, **fields) -> TrainingModel:
    model = build_model(tokenizer, latent_mode=mode, **fields)
    model.model.visual.requires_grad_(mode == "autoregressive")  # then an empty look at nothing must not stall either
    if checkpointing:
        enable_checkpointing(model.train())
    return TrainingModel(model, SftObjective(model.config, 4.0, LAYERS))


def run(model: TrainingModel, weights: dict, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and its gradients.

    Args:
        weights: as they were before any forward: those of FSDP's root are whole after one without gradients.
    """
    for weight in weights.values():
        weight.grad = None
    loss = model(**batch)["loss"]
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def shard(model: TrainingModel) -> TrainingModel:
    parts = (*model.model.model.language_model.layers, *model.model.model.visual.blocks, model.model.latent_blocks)
    for part in parts:
        fully_shard(part)
    return fully_shard(model)


def main(rank: int, world_size: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    torch.randn_like = lambda values: torch.full_like(values, 0.5)  # noise that is the same in one process and in two
    tokenizer = build_tokenizer(LATENT_TOKENS)
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 64)
    for mode, checkpointing, fields in (
        ("parallel", False, {}),
        ("parallel", True, {"latent_scale": "fixed", "fixed_latent_grid": [2, 2]}),
        ("autoregressive", False, {}),
    ):
        whole = build(tokenizer, mode, checkpointing, **fields).train()
        config = whole.model.config
        processor = DeepLatentProcessor(
            images, tokenizer, chat_template=CHAT_TEMPLATE, num_control_tokens=config.num_control_tokens
        )
        sharded = shard(build(tokenizer, mode, checkpointing, **fields).train())
        parts = dict(sharded.named_parameters())
        assert all(isinstance(weight, DTensor) for weight in parts.values())
        cases = batches_of(processor, config)
        for number, case in enumerate(cases if mode == "parallel" and not checkpointing else cases[:3]):
            expected = [run(whole, dict(whole.named_parameters()), batch) for batch in case]
            loss, gradients = run(sharded, parts, case[rank])
            assert_near(loss, expected[rank][0])
            for name, weight in parts.items():
                mean = sum(found.get(name, torch.zeros(weight.shape)) for _, found in expected) / world_size
                # Nobody opened a block: what is sharded apart has no gradient, what every process touches one of zero.
                gradient = gradients[name].full_tensor() if name in gradients else torch.zeros(weight.shape)
                assert_near(gradient, mean)
            with torch.no_grad():
                assert_near(sharded.eval()(**case[rank])["loss"], whole.eval()(**case[rank])["loss"])
            sharded.train(), whole.train()
            print(f"{mode} case {number}: {float(loss):.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
