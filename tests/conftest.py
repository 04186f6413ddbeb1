"""Small models with weights that matter, and prompts of every shape, shared by all tests. Nothing is downloaded."""

import logging
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Set before numpy is loaded: on a busy machine more threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
import transformers
from helpers import DEPRECATION_WARNINGS, deprecations_in
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from configuration_latentvlm import DeepLatentConfig
from modeling_latentvlm import DeepLatentForConditionalGeneration, decoding_vedas
from modeling_latentvlm.visual_replay_vedas import Replay, pick_tokens
from processing_latentvlm import DeepLatentProcessor
from processing_latentvlm.processing_deeplatent import LATENT_TOKENS
from train.data.small_tokenizer import CHAT_TEMPLATE as CHAT_TEMPLATE
from train.data.small_tokenizer import SPECIAL_TOKENS


# The models are tiny: a second thread only waits for the first.
torch.set_num_threads(1)

CORPUS = [
    "what colour is the small round shape on the left of the picture",
    "the answer is red green blue",
    "user assistant",
]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")


class DeprecationHandler(logging.Handler):
    """Collects what transformers logs about deprecated names."""

    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages += deprecations_in(f"{record.name}: {record.getMessage()}")


DEPRECATIONS = DeprecationHandler()
logging.getLogger("transformers").addHandler(DEPRECATIONS)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture, so that a model that a fixture makes is watched too."""
    DEPRECATIONS.messages.clear()
    # What an earlier test leaves behind would hide a record: `warning_once` remembers what it said, commands silence all.
    transformers.utils.logging.warning_once.cache_clear()
    transformers.utils.logging.set_verbosity_warning()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    outcome = yield
    if item.get_closest_marker("core") and DEPRECATIONS.messages:
        pytest.fail("transformers logged a deprecation:\n" + "\n".join(DEPRECATIONS.messages), pytrace=False)
    return outcome


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("core"):
            item.add_marker(pytest.mark.filterwarnings(*(f"error::{kind}" for kind in DEPRECATION_WARNINGS)))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def build_tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text goes in and comes out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    fast.add_special_tokens({"additional_special_tokens": [*SPECIAL_TOKENS, *extra]})
    return fast


def backbone_fields(tokenizer: PreTrainedTokenizerFast, spare_rows: int = 8) -> dict:
    """Config fields of a tiny Qwen2.5-VL for a tokenizer; real checkpoints have more rows than tokens, so has this."""
    token = tokenizer.convert_tokens_to_ids
    return {
        "text_config": {
            "vocab_size": len(tokenizer) + spare_rows,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
    }


def shake(model: torch.nn.Module) -> torch.nn.Module:
    """Give every weight a size at which it moves the logits: on a fresh model many mistakes do not show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                continue
            std = 0.3 if "latent_blocks" in name and "layers" not in name else 0.12
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def build_model(tokenizer: PreTrainedTokenizerFast, **fields) -> DeepLatentForConditionalGeneration:
    start, pad, end = tokenizer.convert_tokens_to_ids(list(LATENT_TOKENS))
    fields = {"latent_grid_size": 4, "num_autoregressive_latents": 3} | fields
    config = DeepLatentConfig(
        **backbone_fields(tokenizer),
        latent_start_token_id=start,
        latent_pad_token_id=pad,
        latent_end_token_id=end,
        **fields,
    )
    return shake(DeepLatentForConditionalGeneration(config))


def stock_twin(model: DeepLatentForConditionalGeneration) -> Qwen2_5_VLForConditionalGeneration:
    """The backbone's own class around the same weights."""
    fields = model.config.to_dict()
    names = ("text_config", "vision_config", "image_token_id", "video_token_id", "tie_word_embeddings")
    twin = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**{name: fields[name] for name in names})).eval()
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(name.startswith(("latent_control.", "latent_blocks.")) for name in unexpected)
    return twin


def picture(width: int = 56, height: int = 84, seed: int = 0) -> Image.Image:
    """A smooth picture; the processor makes one merged patch of every 28 x 28 pixels."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def user_turn(text: str, *images) -> list[dict]:
    return [
        {
            "role": "user",
            "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}],
        }
    ]


def encode(processor: DeepLatentProcessor, conversations: list, **kwargs):
    kwargs = {"add_generation_prompt": True} | kwargs
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
        **kwargs,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(LATENT_TOKENS)


@pytest.fixture(scope="session")
def image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 64)


@pytest.fixture(scope="session")
def processor(tokenizer, image_processor) -> DeepLatentProcessor:
    return DeepLatentProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def shared_model(tokenizer) -> DeepLatentForConditionalGeneration:
    """For tests that change neither weights nor config nor training mode."""
    return build_model(tokenizer)


@pytest.fixture(params=["parallel", "autoregressive"])
def mode_model(request, tokenizer) -> DeepLatentForConditionalGeneration:
    return build_model(tokenizer, latent_mode=request.param)


@pytest.fixture
def model(tokenizer) -> DeepLatentForConditionalGeneration:
    return build_model(tokenizer)


@pytest.fixture(scope="session")
def conversations() -> list:
    """Rows of unequal length, with one image, two images of unequal size, and none."""
    return [
        user_turn("what colour?", picture(56, 84, 1)),
        user_turn("which of the two is the small round one, left or right?", picture(112, 112, 2), picture(56, 28, 3)),
        user_turn("hello"),
    ]


@pytest.fixture(scope="session")
def batch(processor, conversations):
    return encode(processor, conversations)


@pytest.fixture(scope="session")
def rows(processor, conversations) -> list:
    return [encode(processor, [conversation]) for conversation in conversations]


@pytest.fixture
def imposed_order(monkeypatch):
    """Put picked tokens in a recorded order; which are picked is checked, and left to us."""
    orders: list[torch.Tensor] = []

    def pick(*args) -> Replay:
        replay, wanted = pick_tokens(*args), orders.pop(0)
        assert torch.equal(replay.tokens, wanted.sort(dim=1).values)
        place = (replay.tokens[:, None] == wanted[:, :, None]).int().argmax(-1)
        embeds = replay.embeds.gather(1, place[..., None].expand_as(replay.embeds))
        return Replay(embeds, replay.attended, wanted, replay.positions, replay.picked_embeds)

    monkeypatch.setattr(decoding_vedas, "pick_tokens", pick)
    return orders
