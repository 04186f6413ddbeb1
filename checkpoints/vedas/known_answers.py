"""Known answers: what a checkpoint made of one small prompt when it was written, and the comparison with what it makes now.

`known_answers/answers.safetensors` of a checkpoint holds a picture, the tensors that the processor made of it and of a
question, padded on the left, and what the model made of those tensors: latents, the logits of the first answer positions
and the greedy tokens, in float32 from the stored weights, and in the stored dtype. A second picture, which has to be
resized, is for the processor alone. A library that changed under the code, a damaged
weight or a changed processor shows as a deviation. Tokens are printed and never compared: wrong positions may change
every logit and no token.

The recorded tokens are forced when the answers are recomputed, so that every position is compared after the same tokens.

Tensors that deflate (`zlib`, without loss) to less than half are stored so: pixels, which were most of such a file, to a twentieth.

Shapes: T answer positions, V vocabulary, N latents of all blocks or steps, D hidden size.
"""

import hashlib
import io
import json
import platform
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import PIL
import torch
import transformers
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers.generation import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .hub_code import __version__


FOLDER, FILE = "known_answers", "answers.safetensors"
FORMAT = "2"
READABLE = ("1", FORMAT)  # "1" has no tensors that are deflated
QUESTION = "What color is the small round shape?"
NUM_POSITIONS = 6  # T
NUM_PADS = 3  # masked columns before the prompt: a mask that is ignored shows
# (width, height) in pixels. The first is rounded to whole merged patches, so that nothing is resized; it is no square and
# has several windows of Qwen2.5-VL's vision tower. A processor that makes squares of one size gets a square.
PICTURE_SIZE, RESIZED_SIZE = (168, 140), (300, 170)
# Largest deviation that passes, relative to the root mean square of what is expected. Other thread counts, attention
# kernels and machines stay below half of it; the faults that were tried exceed it by ten times and more.
TOLERANCES = {"float32": 1e-4, "float16": 0.1, "bfloat16": 0.5}
PIXEL_TOLERANCE = 1e-3
RESIZED_TOLERANCE = 0.2  # the backends of image processors resize a little differently
DEFLATED = {str(one).removeprefix("torch."): one for one in (torch.float32, torch.int64, torch.bool, torch.uint8)}
VOLATILE = (  # fields of a config that say nothing about answers, or differ between versions of transformers
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "latentvlm_version",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


class ForcedTokens(LogitsProcessor):
    """Writes the given tokens after the prompt, whatever the model would write."""

    def __init__(self, prompt_length: int, tokens: Tensor):
        self.prompt_length, self.tokens = prompt_length, tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -float("inf"))
        forced[:, int(self.tokens[input_ids.shape[1] - self.prompt_length])] = 0
        return forced


@dataclass
class Answer:
    """What a model made of the prompt in one dtype."""

    logits: Tensor  # (T, V) float32
    tokens: Tensor  # (T,) those that were written
    latents: Tensor | None = None  # (N, D) float32; None: no latents were taken
    grids: Tensor | None = None  # (blocks or steps, 2)

    @property
    def greedy(self) -> list[int]:
        return self.logits.argmax(dim=-1).tolist()


@dataclass
class KnownAnswers:
    """The content of an answers file."""

    inputs: dict[str, Tensor]  # what the processor made
    picture: bytes  # PNG
    question: str
    answers: dict[str, Answer]  # by dtype
    dtype: str  # of the stored weights
    model_type: str
    versions: dict[str, str]
    resized: bytes  # PNG of the second picture
    resized_pixels: Tensor  # what the processor made of it
    config: dict[str, Any] = field(default_factory=dict)  # its lasting fields
    weights: dict[str, str] = field(default_factory=dict)  # digest by name

    def to_bytes(self) -> bytes:
        tensors = {f"inputs.{name}": value.contiguous() for name, value in self.inputs.items()}
        tensors["picture"] = torch.frombuffer(bytearray(self.picture), dtype=torch.uint8)
        tensors["resized"] = torch.frombuffer(bytearray(self.resized), dtype=torch.uint8)
        tensors["resized_pixels"] = self.resized_pixels.contiguous()
        for dtype, answer in self.answers.items():
            present = {name: value for name, value in vars(answer).items() if value is not None}
            tensors |= {f"{dtype}.{name}": value.contiguous() for name, value in present.items()}
        metadata = {
            "format": FORMAT,
            "question": self.question,
            "dtype": self.dtype,
            "model_type": self.model_type,
            "versions": json.dumps(self.versions, sort_keys=True),
            "config": json.dumps(self.config, sort_keys=True),
            "weights": json.dumps(self.weights, sort_keys=True),
        }
        return save_tensors(tensors, metadata)

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> "KnownAnswers":
        """Read an answers file.

        Args:
            where: the file, for messages.

        Raises:
            ValueError: it is damaged, or of another format.
        """
        try:
            metadata = read_metadata(content)
            if metadata.get("format") not in READABLE:
                raise ValueError(
                    f"The known answers in {where} must have format {' or '.join(READABLE)}, got {metadata.get('format')!r}: a "
                    "newer latentvlm wrote them."
                )
            tensors = load_tensors(content)
            if digest_content(tensors) != metadata["content"]:
                raise KeyError("the tensors are not those that were written")
            inputs = {name[len("inputs.") :]: value for name, value in tensors.items() if name.startswith("inputs.")}
            dtypes = [name.partition(".")[0] for name in tensors if name.endswith(".logits")]
            answers = {
                dtype: Answer(
                    logits=tensors[f"{dtype}.logits"],
                    tokens=tensors[f"{dtype}.tokens"],
                    latents=tensors.get(f"{dtype}.latents"),
                    grids=tensors.get(f"{dtype}.grids"),
                )
                for dtype in dtypes
            }
            if metadata["dtype"] not in answers or "input_ids" not in inputs:
                raise KeyError("the answers or the prompt are missing")
            read = {name: json.loads(metadata[name]) for name in ("versions", "config", "weights")}
            return cls(
                inputs=inputs,
                picture=bytes(tensors["picture"].numpy()),
                answers=answers,
                resized=bytes(tensors["resized"].numpy()),
                resized_pixels=tensors["resized_pixels"],
                **read,
                **{name: metadata[name] for name in ("question", "dtype", "model_type")},
            )
        except (SafetensorError, KeyError, json.JSONDecodeError, UnicodeDecodeError, zlib.error) as error:
            raise ValueError(
                f"The known answers in {where} are damaged ({error}). Write new ones: "
                "python -m conversion.check CHECKPOINT --write"
            ) from error


def digest_content(tensors: Mapping[str, Tensor]) -> str:
    """A hash of all tensors of an answers file: a flipped bit must not pass for an answer."""
    together = hashlib.sha256()
    for name in sorted(tensors):
        together.update(f"{name} {digest_weight(tensors[name])}\n".encode())
    return together.hexdigest()


def read_metadata(content: bytes) -> dict[str, str]:
    """The metadata in a safetensors header, which `safetensors.torch.load` leaves out."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]).get("__metadata__", {})


def save_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """An answers file. What its metadata say of the tensors is added: their digest, and dtype and shape of those that are deflated."""
    stored, deflated = dict(tensors), {}
    for name, value in tensors.items():
        content = zlib.compress(bytes_of(value), 9)
        if 2 * len(content) < value.numel() * value.element_size():
            stored[name] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            deflated[name] = [str(value.dtype).removeprefix("torch."), list(value.shape)]
    added = {"content": digest_content(tensors), "deflated": json.dumps(deflated, sort_keys=True)}
    return save(stored, {**metadata, **added})


def load_tensors(content: bytes) -> dict[str, Tensor]:
    """All tensors of an answers file as they were before they were deflated.

    Raises:
        SafetensorError, KeyError, zlib.error: the file is damaged.
    """
    tensors = load(content)
    for name, (dtype, shape) in json.loads(read_metadata(content).get("deflated", "{}")).items():
        empty = torch.empty(shape, dtype=DEFLATED[dtype], device="meta")
        size = empty.numel() * empty.element_size()
        reader = zlib.decompressobj()
        inflated = reader.decompress(bytes_of(tensors[name]), size + 1)  # never more than what is expected
        if len(inflated) != size or not reader.eof:
            raise KeyError(f"{name} has not the size that it should have")
        tensors[name] = torch.frombuffer(bytearray(inflated), dtype=empty.dtype).view(shape)
    return tensors


def bytes_of(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def dtype_name(model) -> str:
    """The dtype of a model as the answers file spells it, e.g. "bfloat16"."""
    return str(model.dtype).removeprefix("torch.")


def versions_here() -> dict[str, str]:
    return {
        "latentvlm": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
    }


def fitting_size(processor) -> tuple[int, int]:
    """(width, height) of a picture that the processor need not resize."""
    side = getattr(processor, "image_size", None)
    if side is not None:
        return side, side
    patch = processor.image_processor.patch_size * processor.image_processor.merge_size
    return tuple(patch * max(1, round(pixels / patch)) for pixels in PICTURE_SIZE)


def draw_picture(width: int, height: int) -> Image.Image:
    """A picture that nobody can mirror or turn unseen."""
    picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    draw = ImageDraw.Draw(picture)

    def scale(*points: float) -> list[float]:
        return [point * (height if at % 2 else width) for at, point in enumerate(points)]

    draw.rectangle(scale(0.1, 0.1, 0.45, 0.3), fill=(200, 40, 30))
    draw.ellipse(scale(0.6, 0.55, 0.85, 0.8), fill=(20, 60, 220))
    draw.polygon(scale(0.15, 0.9, 0.3, 0.6, 0.45, 0.9), fill=(30, 170, 60))
    return picture


def to_png(picture: Image.Image) -> bytes:
    stored = io.BytesIO()
    picture.save(stored, format="PNG")
    return stored.getvalue()


def pad_left(inputs: dict[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """Put masked columns before a prompt of one row."""
    length = inputs["input_ids"].shape[1]
    fill = {"input_ids": pad_token_id}
    return {
        name: torch.nn.functional.pad(value, (NUM_PADS, 0), value=fill.get(name, 0))
        if value.shape == (1, length)
        else value
        for name, value in inputs.items()
    }


def encode(processor, picture: Image.Image, question: str) -> dict[str, Tensor]:
    """What the processor makes of the prompt."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    messages, settings = [{"role": "user", "content": content}], {"add_generation_prompt": True}
    if processor.chat_template is None or processor.image_token not in processor.apply_chat_template(
        messages, tokenize=False, **settings
    ):  # no template, or one of a language model, which knows no pictures
        return dict(processor(text=[processor.image_token + question], images=[picture], return_tensors="pt"))
    return dict(
        processor.apply_chat_template([messages], tokenize=True, return_dict=True, return_tensors="pt", **settings)
    )


def compute_answer(
    model, inputs: Mapping[str, Tensor], known: Answer | None = None, force_grids: bool = False
) -> Answer:
    """What a model makes of the prompt now.

    Args:
        known: its tokens are written in place of the model's own.
        force_grids: also give blocks the known sizes: in a narrow dtype a predicted size may tip over.
    """
    device, modes = model.device, {module: module.training for module in model.modules()}
    moved = {name: value.to(device) for name, value in inputs.items()}
    length = moved["input_ids"].shape[1]
    forced = [] if known is None else [ForcedTokens(length, known.tokens)]
    grids = known.grids if force_grids and known is not None else None
    # What a user set for generation (a cache, stop strings, several answers) is not what was recorded.
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output = model.eval().generate(
            **moved,
            **model.known_answer_settings(grids),
            logits_processor=LogitsProcessorList(forced),
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            max_new_tokens=NUM_POSITIONS if known is None else len(known.tokens),
            return_dict_in_generate=True,
            output_logits=True,
            output_latents=True,
        )
    finally:
        model.generation_config = settings
        for module, is_training in modes.items():
            module.training = is_training
    steps = output.latent_trace.steps
    return Answer(
        logits=torch.cat(output.logits).float().cpu(),
        tokens=output.sequences[0, length:].cpu(),
        latents=torch.cat([step.latents for step in steps]).float().cpu() if steps else None,
        grids=torch.tensor([step.grid for step in steps]) if steps else None,
    )


def record(model, processor) -> KnownAnswers:
    """Record a prompt and what the model makes of it in the dtype that it is in."""
    picture, resized = draw_picture(*fitting_size(processor)), draw_picture(*RESIZED_SIZE)
    pad = processor.tokenizer.pad_token_id
    inputs = pad_left(encode(processor, picture, QUESTION), 0 if pad is None else pad)
    answer = compute_answer(model, inputs)
    dtype = dtype_name(model)
    return KnownAnswers(
        inputs=inputs,
        picture=to_png(picture),
        resized=to_png(resized),
        resized_pixels=encode(processor, resized, QUESTION)["pixel_values"],
        config=lasting_fields(model.config),
        question=QUESTION,
        answers={dtype: answer},
        dtype=dtype,
        model_type=model.config.model_type,
        versions=versions_here(),
    )


def digest_weights(state: Mapping[str, Tensor]) -> dict[str, str]:
    """A short hash of every weight's bytes, by name; smallest first, so that a comparison ends early."""
    return {name: digest_weight(state[name]) for name in sorted(state, key=lambda name: (state[name].numel(), name))}


def digest_weight(value: Tensor) -> str:
    content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    header = f"{value.dtype} {tuple(value.shape)}".encode()
    return hashlib.sha256(header + b"\n" + memoryview(content)).hexdigest()[:16]


def find_changed_weight(known: Mapping[str, str], state: Mapping[str, Tensor]) -> str | None:
    """The first weight that is not the one that was recorded, or None. Weights that cannot be read count as changed."""
    other = known.keys() ^ {name for name, value in state.items() if isinstance(value, Tensor)}
    if other:
        return min(other)
    for name in sorted(known, key=lambda name: (state[name].numel(), name)):
        value = state[name]
        if value.is_meta or hasattr(value, "placements") or digest_weight(value) != known[name]:
            return name
    return None


def lasting_fields(config: Any) -> dict[str, Any]:
    """The fields of a config that answers follow from."""

    def strip(fields: dict) -> dict:
        return {
            name: strip(value) if isinstance(value, dict) else value
            for name, value in fields.items()
            if name not in VOLATILE
        }

    return strip(config.to_dict())


def deviation(actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest difference, relative to the root mean square of what is expected, over the tolerance."""
    actual, expected = actual.double(), expected.double()
    scale = expected.square().mean().sqrt().clamp(min=1e-12)
    largest = float((actual - expected).abs().max() / scale)
    return largest / tolerance if scale.isfinite() and largest == largest else float("inf")
