"""How much a reader has to read from `<latent>` to the logits behind its block, and names of 0.1 that still work."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from reading_path import trace_block_step
from same_numbers_models import GREEDY, build_lare, build_vedas, lare_batch, qwen_batch

from configuration_latentvlm import VedasConfig
from modeling_latentvlm.trace import LatentStepsGenerateBeamOutput, LatentStepsGenerateOutput


pytestmark = pytest.mark.core


def test_the_path_of_a_block_is_short():
    """House rule: 20 functions in 5 files. Of today's, 17 in one file are the layers of the LatentFormer themselves."""
    path = trace_block_step()
    files = [file for file, _ in path]
    assert ("decoding_deeplatent.py", "ParallelLatents.build") in path
    assert len(path) <= 50 and len(set(files)) <= 12, path
    assert len(path) - files.count("latent_former_deeplatent.py") <= 33


@pytest.mark.parametrize("build, batch", [(build_lare, lare_batch), (build_vedas, qwen_batch)])
@pytest.mark.parametrize("beams, kind", [(1, LatentStepsGenerateOutput), (2, LatentStepsGenerateBeamOutput)])
def test_a_step_is_called_a_step_and_the_old_name_is_read(build, batch, beams, kind):
    output = build().generate(**batch(), **GREEDY | {"max_new_tokens": 2}, num_beams=beams)
    assert type(output) is kind and output.num_latent_steps.shape == (3,) and (output.num_latent_steps > 0).all()
    assert output.num_latent_blocks is output["num_latent_blocks"] is output.num_latent_steps
    assert "num_latent_blocks" in output and "num_latent_blocks" not in list(output)
    assert output.latent_grid_hw is None and list(output).count("num_latent_steps") == 1


def test_old_names_of_vedas_fields_are_read(tmp_path):
    config = VedasConfig(alpha=5, step_alpha=2)
    assert (config.num_routed_tokens, config.num_routed_step_tokens) == (5, 2) == (config.alpha, config.step_alpha)
    config.alpha = 6
    assert config.num_routed_tokens == 6 and not {"alpha", "step_alpha"} & config.to_dict().keys()
    config.to_json_file(tmp_path / "config.json")
    text = (tmp_path / "config.json").read_text().replace("num_routed_tokens", "alpha")
    (tmp_path / "config.json").write_text(text.replace("num_routed_step_tokens", "step_alpha"))
    assert VedasConfig.from_pretrained(tmp_path).routed_token_counts() == [6] * config.text_config.num_hidden_layers
    assert VedasConfig.from_pretrained(tmp_path).routed_token_counts(step=True)[0] == 2
    with pytest.raises((ValueError, StrictDataclassError), match="old name of `num_routed_tokens`"):
        VedasConfig(alpha=5, num_routed_tokens=7)
