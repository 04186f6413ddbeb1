"""The configuration: defaults, validation, and a round trip through JSON."""

import pytest
from conftest import backbone_fields, build_tokenizer
from huggingface_hub.errors import StrictDataclassError

from configuration_latentvlm import DeepLatentConfig, LaReConfig, VedasConfig, __version__
from configuration_latentvlm.model_card import render_model_card
from processing_latentvlm.processing_deeplatent import LATENT_TOKENS


pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def fields() -> dict:
    tokenizer = build_tokenizer(LATENT_TOKENS)
    names = ("latent_start_token_id", "latent_pad_token_id", "latent_end_token_id")
    return backbone_fields(tokenizer) | dict(zip(names, tokenizer.convert_tokens_to_ids(list(LATENT_TOKENS))))


def test_defaults_are_the_papers():
    config = DeepLatentConfig()
    assert (config.latent_grid_size, config.max_latent_blocks, config.latentformer_layers) == (16, 5, 1)
    assert config.fixed_latent_grid == [16, 16] and config.num_control_tokens == 3
    assert config.modulation_hidden_size == config.text_config.hidden_size // 4
    assert config.latentformer_heads == config.text_config.num_attention_heads
    assert DeepLatentConfig(latent_mode="autoregressive").num_control_tokens == 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"latent_grid_size": 0}, "`latent_grid_size` must be >= 1, got 0"),
        ({"max_latent_blocks": -1}, "`max_latent_blocks` must be >= 0"),
        ({"latent_mode": "serial"}, "latent_mode.*serial"),
        ({"latent_scale": "big"}, "latent_scale"),
        ({"fixed_latent_grid": [17, 1]}, "fixed_latent_grid.*17"),
        ({"fixed_latent_grid": [2]}, "fixed_latent_grid"),
        ({"latentformer_heads": 3}, r"latentformer_heads` \(3\).*\(64\)"),
        ({"latent_query_rms": 0.0}, "latent_query_rms"),
        ({"latent_query_rms": float("nan")}, "latent_query_rms"),
        ({"latent_start_token_id": 10**6}, "latent_start_token_id.*1000000"),
        ({"latent_pad_token_id": 5, "latent_end_token_id": 5}, "differ"),
        ({"latent_grid_size": "many"}, "latent_grid_size"),
    ],
)
def test_wrong_values_raise(fields, wrong, message):
    with pytest.raises(StrictDataclassError, match=message):
        DeepLatentConfig(**(fields | wrong))


def test_round_trip_through_json(fields, tmp_path):
    config = DeepLatentConfig(**fields, latent_grid_size=24, base_model="Qwen/x")
    config.save_pretrained(tmp_path)
    loaded = DeepLatentConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.latent_grid_size == 24 and loaded.latentvlm_version == __version__
    assert loaded.auto_map["AutoModel"] == "modeling_deeplatent.DeepLatentForConditionalGeneration"


def test_the_card_says_where_it_comes_from(fields):
    card = render_model_card(
        DeepLatentConfig(**fields, base_model="Qwen/Qwen2.5-VL-7B", base_model_license="apache-2.0")
    )
    head = card.split("---")[1]
    for line in (
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "license: apache-2.0",
        "base_model: Qwen/Qwen2.5-VL-7B",
    ):
        assert line in head.splitlines()
    assert "trust_remote_code=True" in card and "DeepLatentForConditionalGeneration" in card
    plain = render_model_card(DeepLatentConfig(**fields))
    assert "license:" not in plain.split("---")[1] and "unknown origin" in plain


def test_lares_defaults_are_the_papers():
    config = LaReConfig()
    assert (config.image_grid_size, config.image_seq_length, config.vision_feature_layer) == (16, 256, -2)
    assert (config.num_refocus_steps, config.step_limit, config.window_size, config.num_windows) == (4, 4, 8, 1)
    extractor = (config.extractor_hidden_size, config.extractor_num_heads, config.extractor_num_layers)
    assert extractor == (1536, 12, 2) and config.extractor_intermediate_size == 4 * 1536
    assert config.num_step_latents == config.text_config.num_hidden_layers
    assert LaReConfig(adaptive_stop="l1").step_limit == 8
    assert LaReConfig(adaptive_stop="l1", num_refocus_steps=0).step_limit == 0


def test_lares_round_trip_through_json(tmp_path):
    config = LaReConfig(adaptive_stop="cosine", latent_tokens_per_step=6, base_model="Qwen/x", base_vision_tower="y")
    config.save_pretrained(tmp_path)
    loaded = LaReConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.latent_tokens_per_step == 6 and loaded.latentvlm_version == __version__
    assert loaded.auto_map["AutoModelForCausalLM"] == "modeling_lare.LaReForCausalLM"
    assert "LaReForCausalLM" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "kind, wrong, message",
    [
        ("deeplatent", {"log_sigma_init": float("nan")}, "`log_sigma_init` must be finite, got nan"),
        ("deeplatent", {"log_sigma_init": float("inf")}, "`log_sigma_init` must be finite"),
        ("deeplatent", {"latentformer_heads": 0}, "`latentformer_heads`"),
        ("lare", {"extractor_num_heads": 0}, "`extractor_num_heads` .* divide|`extractor_num_heads` must be >= 1"),
        ("lare", {"extractor_num_heads": -2}, "`extractor_num_heads`"),
        (
            "lare",
            {"vision_config": {"model_type": "clip_vision_model", "hidden_act": "quick_gely"}},
            "`vision_config.hidden_act` must be one of",
        ),
        (
            "deeplatent",
            {"text_config": {"hidden_act": "sily"}},
            "`text_config.hidden_act` must be one of .* got 'sily'",
        ),
        ("vedas", {"latent_token_id": -1}, "`latent_token_id` must lie within"),
        (
            "vedas",
            {"latent_token_id": 10**6},
            r"`latent_token_id` must lie within `text_config.vocab_size` \(152064\), got 1000000",
        ),
        ("vedas", {"latent_token_id": 151655}, "`latent_token_id` and `image_token_id` must differ, both are 151655"),
    ],
)
def test_values_that_no_model_can_have_are_named(kind, wrong, message):
    classes = {"deeplatent": DeepLatentConfig, "lare": LaReConfig, "vedas": VedasConfig}
    with pytest.raises(StrictDataclassError, match=message):
        classes[kind](**wrong)


@pytest.mark.parametrize("content", ["[]", "5", "null", "{", "[" * 100_000], ids=lambda text: text[:5])
@pytest.mark.parametrize("kind", ["deeplatent", "lare", "vedas"])
def test_a_config_file_that_holds_no_object_is_named(kind, content, tmp_path):
    classes = {"deeplatent": DeepLatentConfig, "lare": LaReConfig, "vedas": VedasConfig}
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object"):
        classes[kind].from_pretrained(tmp_path)
