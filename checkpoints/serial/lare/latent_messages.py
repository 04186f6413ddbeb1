"""What all processors share: images that can be seen, latents in messages, and tokens that nobody but the model writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .model_numbers import HUB_ARGUMENTS, find_config
from .pictures import describe_picture, open_picture
from .text_checks import check_conversation, template_errors


MAX_LATENTS = 4096  # of one block, or steps of one turn: 64 x 64 merged patches


class LatentProcessorMixin:
    """For a `ProcessorMixin` whose tokenizer has tokens of ours, which `latent_tokens` names. They act, so they are reserved."""

    latent_tokens: tuple[str, ...] = ()
    converter = ""
    config_class: type | None = None  # of the model
    # Arguments of `__init__` that are numbers of the model's config. They are read from there where the processor lies beside
    # it, and are then not saved again; a processor that is saved alone keeps them.
    model_numbers: tuple[str, ...] = ()

    @classmethod
    def numbers_of(cls, config: Any) -> dict[str, Any]:
        """The `model_numbers` as a model's config says them."""
        return {}

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, with the numbers of the model that lies beside the processor.

        A number that is nowhere to be found, since the config beside it is gone, is None: what needs it will ask for it.

        Raises:
            ValueError: both files hold a number, as in checkpoints of earlier versions, and they differ.
        """
        chosen = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        processor_dict, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if not cls.model_numbers:
            return processor_dict, unused
        config = find_config(pretrained_model_name_or_path, cls.config_class, chosen)
        said = {} if config is None else cls.numbers_of(config)
        for name in cls.model_numbers:
            stored = processor_dict.setdefault(name, said.get(name))
            if stored is not None and name in said and stored != said[name]:
                raise ValueError(
                    f"In {pretrained_model_name_or_path} the processor's `{name}` is {stored}, but the model's config says "
                    f"{said[name]}: leave `{name}` out of processor_config.json."
                )
        return processor_dict, unused

    def to_json_file(self, json_file_path, *args, **kwargs) -> None:
        super().to_json_file(json_file_path, *args, **kwargs)
        path = Path(json_file_path)
        config = find_config(path.parent, self.config_class, {}) if self.model_numbers else None
        if config is None:
            return
        content, said = json.loads(path.read_text(encoding="utf-8")), self.numbers_of(config)
        # One that differs stays: loading names both.
        kept = {name: value for name, value in content.items() if name not in said or value != said[name]}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def check_model(self, config: Any) -> None:
        """Take the numbers of the model that this processor is used with, or require that they are the same.

        Raises:
            ValueError: the processor was made for another model.
        """
        for name, value in self.numbers_of(config).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
            elif getattr(self, name) != value:
                raise ValueError(
                    f"The processor's `{name}` is {getattr(self, name)}, but the model's config says {value}: they belong to "
                    "different checkpoints."
                )

    def need_number(self, name: str) -> Any:
        """A number of the model.

        Raises:
            ValueError: the processor was loaded without its model's config.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"`{name}` is not known: this processor was loaded from a folder without its model's config.json. Load it from "
                f"the model's folder, or give `{name}` to `from_pretrained`."
            )
        return value

    def check_image_count(self, rows: list[str], images: Any) -> None:
        """Every placeholder of the text needs an image, and every image a placeholder."""
        asked = [sample.count(self.image_token) for sample in rows]
        nested = isinstance(images, list) and images and all(isinstance(row, list) for row in images)
        given = (
            [len(row) for row in images]
            if nested
            else [len(images) if isinstance(images, list) else 0 if images is None else 1]
        )
        by_row = nested and len(given) == len(asked)
        wrong = asked != given if by_row else sum(asked) != sum(given)
        if wrong:
            differing = [row for row, (one, other) in enumerate(zip(asked, given)) if one != other]
            where = f" Rows {differing} differ." if by_row else ""
            raise ValueError(
                f"The rows of `text` have {asked} image placeholders, but {given} images were given.{where}"
            )

    def load_images(self, images: Any, where: str = "") -> Any:
        """Open all images as 8-bit RGB, keeping the nesting (`pictures.py`), and refuse what cannot be seen."""
        if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:  # a batch
            images = list(images)
        if isinstance(images, list | tuple):
            return [self.load_images(image, f"{where}[{index}]") for index, image in enumerate(images)]
        return open_picture(images, f"`images{where}` ({describe_picture(images)})", allow_addresses=True)

    def prepare_images(self, images: Any, kwargs: dict) -> Any:
        """Open images, unless the caller says how arrays are to be read; no image at all is None.

        Raises:
            ValueError: an image cannot be read or is empty; the message names its index.
        """
        if isinstance(images, list | tuple) and all(isinstance(row, list | tuple) and not row for row in images):
            return None
        given = kwargs | (kwargs.get("images_kwargs") or {})
        if (
            given.get("do_rescale", self.image_processor.do_rescale) is not False
            and given.get("input_data_format") is None
        ):
            return self.load_images(images)
        return self.load_unscaled(images)

    def load_unscaled(self, images: Any, where: str = "") -> Any:
        """As `load_images`, but arrays stay as they are: `do_rescale=False` and `input_data_format` are about those."""
        if isinstance(images, list | tuple):
            return [self.load_unscaled(image, f"{where}[{index}]") for index, image in enumerate(images)]
        if not isinstance(images, np.ndarray | torch.Tensor):
            return self.load_images(images, where)
        if 0 in images.shape:
            raise ValueError(f"`images{where}` must have at least one pixel, its shape is {tuple(images.shape)}.")
        return images

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As in transformers, with the items of `render_latent` in assistant messages."""
        check_conversation(conversation)
        batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        rendered = [
            [self.render_message(message) for message in messages]
            for messages in (conversation if batched else [conversation])
        ]
        with template_errors():
            return super().apply_chat_template(rendered if batched else rendered[0], *args, **kwargs)

    def render_message(self, message: dict) -> dict:
        content = message.get("content")
        if isinstance(content, str):
            self.check_reserved(content, message)
            return message if content else message | {"content": [{"type": "text", "text": ""}]}
        items = []
        for item in content or []:
            if item["type"] == "latent":
                items.append({"type": "text", "text": self.render_latent(item)})
            else:
                self.check_reserved(item.get("text"), message)
                items.append(item)
        # Language models' templates concatenate contents, and know no empty list.
        return message | {"content": items or [{"type": "text", "text": ""}]}

    def check_num_latents(self, count: int, what: str) -> None:
        """Refuse more latents than any model has, before their placeholders take the machine's memory.

        Raises:
            ValueError: `count` is above the limit.
        """
        if count > MAX_LATENTS:
            raise ValueError(f"{what} has {count} latents; {MAX_LATENTS} are the most.")

    def render_latent(self, item: dict) -> str:
        """The text of a `{"type": "latent", ...}` item."""
        raise NotImplementedError

    def check_reserved(self, text: Any, message: dict) -> None:
        """Refuse latent tokens in what somebody else than the model wrote: they would act, not be read."""
        if message.get("role") == "assistant" or not isinstance(text, str):
            return
        found = [token for token in self.latent_tokens if token in text]
        if found:
            raise ValueError(f"A {message.get('role')} message holds {found[0]!r}, which is reserved for the model.")
