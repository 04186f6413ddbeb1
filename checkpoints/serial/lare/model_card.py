"""The model card (README.md) that goes with a checkpoint, written from its config."""

import re
from pathlib import Path


GENERIC_CARD = "# Model Card for Model ID"  # what transformers writes where it finds no card

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
{metadata}tags:
- latentvlm
- latent-reasoning
- {model_type}
---

# {architecture}

A vision-language model that reasons in latent space, on {backbone}. Written by
latentvlm {version}; the code it needs lies beside the weights.

```python
from transformers import AutoModel, AutoProcessor

path = "path/to/this/checkpoint"  # a folder, or the name of a repository on the Hub
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
model = AutoModel.from_pretrained(path, trust_remote_code=True, dtype="auto")
messages = [{{"role": "user", "content": [
    {{"type": "image", "image": "photo.jpg"}}, {{"type": "text", "text": "What is this?"}}]}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(
    **inputs, max_new_tokens=256, return_dict_in_generate=True, output_latents=True
)
print(processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
print(output.num_latent_blocks, output.stop_reason)
```

| | |
|---|---|
| architecture | `{architecture}` (`model_type: {model_type}`) |
| backbone | {backbone} |
| licence | {license} |
"""


def is_repository(name: str | None) -> bool:
    """Whether a name can be that of a repository on the Hub, `owner/name`."""
    return bool(name) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def named_backbone(name: str | None) -> str:
    """How the text of the card calls the backbone: a folder's name alone says nothing."""
    if not name:
        return "a backbone of unknown origin"
    return name if is_repository(name) else f"a local backbone (`{name}`)"


def render_model_card(config) -> str:
    """Fill in the card for a config with `base_model`, `base_model_license` and `latentvlm_version`."""
    metadata = ""
    if config.base_model_license:
        metadata += f"license: {config.base_model_license}\n"
    if is_repository(config.base_model):  # the Hub links it: the name of a folder would be somebody else's model
        metadata += f"base_model: {config.base_model}\n"
    return CARD.format(
        metadata=metadata,
        model_type=config.model_type,
        architecture=(config.architectures or [config.hub_classes["AutoModel"].rpartition(".")[2]])[0],
        backbone=named_backbone(config.base_model),
        version=config.latentvlm_version,
        license=config.base_model_license or "not stated: that of the backbone",
    )


def write_model_card(config, folder: Path) -> None:
    """Write README.md unless there is one that somebody wrote."""
    card = folder / "README.md"
    if not card.exists() or GENERIC_CARD in card.read_text(encoding="utf-8"):
        card.write_text(render_model_card(config), encoding="utf-8")
