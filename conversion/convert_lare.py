"""Join a vision tower and a language model to a LaRe checkpoint: both bit for bit, and a fresh Extractor.

    python -m conversion.convert_lare --vision-tower openai/clip-vit-large-patch14 \
        --language-model Qwen/Qwen2.5-7B-Instruct --output out/lare
    python -m conversion.convert_lare --vision-tower CLIP_FOLDER --language-model VICUNA_FOLDER \
        --projector mm_projector.bin --output OUT --dtype bfloat16 --set num_refocus_steps=2

Weights are streamed, so memory stays near the largest shard. The projector is fresh unless one is given: LLaVA-1.5's
`mm_projector.bin`, or a `llava-hf` checkpoint. Pictures are resized to the tower's size as a whole, as in the paper, not
cropped to their centre. The output loads with `AutoModel.from_pretrained(OUT, trust_remote_code=True)`.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.configuration_llava import LlavaConfig

from configuration_latentvlm.configuration_lare import LANGUAGE_MODELS, NUM_CLASS_TOKENS, LaReConfig
from conversion.backbone import (
    add_tokens,
    carried_fields,
    check_overrides,
    choose_dtype,
    copy_legal_files,
    find_license,
    load_image_processor,
    load_tokenizer,
    locate_backbone,
    name_backbone,
    parse_overrides,
    read_config,
    read_model_type,
    write_generation_config,
)
from conversion.checkpoint_io import (
    ROWS_AT_ONCE,
    Edit,
    JoinedWeights,
    SourceWeights,
    check_output,
    check_weights,
    extend_vocabulary,
    find_vocabulary_weights,
    grown_vocabulary,
    initialize_weights,
    write_weights,
)
from conversion.commands import CommandParser, exit_on_error
from conversion.converter_options import add_converter_options
from conversion.known_answers import record_answers
from conversion.projector_weights import PROJECTOR, load_projector
from conversion.qwen_backbone import dtype_of_new_weights, report
from conversion.writing import replaced_folder
from modeling_latentvlm import LaReForCausalLM
from processing_latentvlm import LaReProcessor
from processing_latentvlm.processing_lare import BOT, EOT, IMAGE


TOKENS = {"bot_token_id": BOT, "eot_token_id": EOT, "image_token_index": IMAGE}
EMBEDDINGS = "model.language_model.embed_tokens.weight"
# Of FastChat's `vicuna_v1.1`, for tokenizers that bring no template, as Vicuna's.
VICUNA_TEMPLATE = (
    "{{- bos_token or '' -}}"
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = 'A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user\\'s questions.' -%}{%- set turns = messages -%}{%- endif -%}"
    "{{- system + ' ' -}}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}{{- 'USER: ' + message['content'] + ' ' -}}"
    "{%- else -%}{{- 'ASSISTANT: ' -}}{%- generation -%}{{- message['content'] + (eos_token or '') -}}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)


def read_part(folder: Path, kinds: tuple[str, ...], option: str) -> PreTrainedConfig:
    """Read the config of the tower or the language model, of one of these model types.

    Raises:
        ValueError: it is of another model type, or quantised.
    """
    kind = read_model_type(folder)
    if kind not in kinds:
        raise ValueError(f"`{option}` must be of a `model_type` among {list(kinds)}, got {kind!r} in {folder}.")
    return read_config(folder, type(AutoConfig.for_model(kind)))


def read_vision_config(folder: Path) -> PreTrainedConfig:
    """Of a vision tower, alone or with its text tower beside it."""
    whole = tuple(kind.removesuffix("_vision_model") for kind in NUM_CLASS_TOKENS)
    config = read_part(folder, (*NUM_CLASS_TOKENS, *whole), "vision-tower")
    return getattr(config, "vision_config", config)


def rename_language_weight(name: str) -> str | None:
    """Name in the model of a language model's weight; None for buffers that older checkpoints hold."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def rename_vision_weight(name: str, is_whole: bool, prefix: str) -> str | None:
    """Name in the model of a tower's weight; None for those of the text tower beside it, and for buffers.

    Args:
        is_whole: whether the checkpoint has a text tower too.
        prefix: of the tower in the model.
    """
    if name.endswith("embeddings.position_ids") or (is_whole and not name.startswith("vision_model.")):
        return None
    return prefix + name.removeprefix("vision_model.")


def measure_rms(weights: JoinedWeights, known_ids: list[int]) -> float:
    """Root mean square of the token embeddings, those of known tokens: spare rows were never trained."""
    rows, total, count = weights.read(EMBEDDINGS), 0.0, 0
    known = torch.tensor(sorted(token for token in known_ids if token < len(rows)))
    for ids in known.split(ROWS_AT_ONCE):
        part = rows[ids].float()
        total += float(part.square().sum(dtype=torch.float64))
        count += part.numel()
    rms = math.sqrt(total / max(count, 1))
    if not 0 < rms < float("inf"):
        raise ValueError(f"The token embeddings of the language model must have a finite size above 0, got {rms}.")
    return rms


def build_config(
    text: PreTrainedConfig, vision: PreTrainedConfig, vocabulary: dict, dtype, fields: dict
) -> LaReConfig:
    """Both parts' configs with our tokens, room for them, and what the caller set."""
    ids = {name: vocabulary[token] for name, token in TOKENS.items()}
    parts = {}
    for name, config in (("text_config", text), ("vision_config", vision)):
        kept = carried_fields(config)
        parts[name] = kept | {"model_type": config.model_type}
    parts["text_config"]["vocab_size"] = grown_vocabulary(text.vocab_size, ids.values())
    strategy = "default" if NUM_CLASS_TOKENS[vision.model_type] else "full"
    config = LaReConfig(**parts, **ids, vision_feature_select_strategy=strategy, **fields)
    config.architectures = [LaReForCausalLM.__name__]
    config.dtype = dtype
    for part in (config.text_config, config.vision_config):
        part.dtype = dtype
    return config


def join_weights(
    language: SourceWeights, vision: SourceWeights, is_whole: bool, model, num_rows: int
) -> JoinedWeights:
    """Both parts' weights under their names in the model, all that it needs besides new ones.

    Raises:
        ValueError: a weight is missing, unknown, or of another shape; the message names it.
    """
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    prefix = "model.vision_tower."
    if any(name.startswith(prefix + "vision_model.") for name in expected):  # as transformers had it until 5.20
        prefix += "vision_model."
    rename_vision = partial(rename_vision_weight, is_whole=is_whole, prefix=prefix)
    weights = JoinedWeights([(language, rename_language_weight), (vision, rename_vision)])
    for name in find_vocabulary_weights(model):
        expected[name] = (num_rows, *expected[name][1:])
    expected = {name: shape for name, shape in expected.items() if not name.startswith(("refocus.", PROJECTOR))}
    check_weights(weights, lambda name: name, expected, optional=set(model.all_tied_weights_keys))
    return weights


def choose_pad_token(tokenizer) -> None:
    """Language models that never saw a batch have none; any token will do, since padding is masked."""
    if tokenizer.pad_token is None:
        known = tokenizer.get_vocab()
        spare = [token for token in ("<|finetune_right_pad_id|>", tokenizer.unk_token) if token in known]
        tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
        report(f"The language model's tokenizer pads with nothing: {tokenizer.pad_token} is taken.")


def load_language_tokenizer(folder: Path):
    """The tokenizer, padding on the left, with a pad token and a chat template."""
    try:
        tokenizer = load_tokenizer(folder)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`language-model` must hold a tokenizer: {reason}") from error
    choose_pad_token(tokenizer)
    tokenizer.padding_side = "left"  # `generate` goes on from the last column
    if tokenizer.chat_template is None:
        report("The language model's tokenizer has no chat template: Vicuna's is taken.")
        tokenizer.chat_template = VICUNA_TEMPLATE
    return tokenizer


def load_tower_processor(folder: Path, size: int):
    """The tower's image processor, which resizes a picture as a whole: a crop would hide what lies beside."""
    fields = {"size": {"height": size, "width": size}, "do_resize": True, "do_center_crop": False}
    try:
        return load_image_processor(folder, CLIPImageProcessorPil, **fields)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`vision-tower` must hold an image processor: {reason}") from error


def convert_lare(
    vision_tower: str | Path,
    language_model: str | Path,
    output: str | Path,
    projector: str | Path | None = None,
    dtype: str | None = None,
    overrides: dict[str, Any] | None = None,
    seed: int = 0,
    force: bool = False,
    license: str | None = None,
    known_answers: bool = True,
) -> Path:
    """Write a checkpoint around two models' weights, whole or not at all, and return its folder.

    Args:
        vision_tower: folder or Hub id of a CLIP or SigLIP model, with or without its text tower.
        language_model: folder or Hub id of a Qwen2, Qwen2.5, Qwen3 or Llama model.
        projector: file, folder or Hub id of a trained projector.
        dtype: "bfloat16", "float16" or "float32"; by default every weight keeps its own.
        overrides: fields that LaRe's config adds to LLaVA's.
        seed: of the new weights.
        force: replace a checkpoint that lies at `output`.
        license: for the model card; by default what the language model's says.
        known_answers: record what the checkpoint answers, which takes its weights in float32 at once.

    Raises:
        ValueError: a part, the output folder or a field is not what it must be; the message says which.
        StrictDataclassError: a field's value is refused by the config.
    """
    cast_to, output = choose_dtype(dtype), Path(output).expanduser()
    decided = ("bot_token_id", "eot_token_id", "latentvlm_version")
    overrides = check_overrides(overrides or {}, LaReConfig, LlavaConfig, decided)
    tower, language = locate_backbone(vision_tower, "vision-tower"), locate_backbone(language_model, "language-model")
    for folder in (tower, language):
        check_output(output, folder, force)
    text, vision = read_part(language, LANGUAGE_MODELS, "language-model"), read_vision_config(tower)
    sources = SourceWeights(language), SourceWeights(tower)
    tokenizer = load_language_tokenizer(language)
    known_ids = list(tokenizer.get_vocab().values())
    added_ids = list(add_tokens(tokenizer, tuple(TOKENS.values())).values())

    card = {
        "base_model": name_backbone(language_model),
        "base_model_license": license or find_license(language),
        "base_vision_tower": name_backbone(vision_tower),
    }
    kept_dtype = cast_to or text.dtype or next(iter(sources[0].entries.values())).dtype
    config = build_config(text, vision, tokenizer.get_vocab(), kept_dtype, card | overrides)
    with torch.device("meta"):
        model = LaReForCausalLM(config)
    is_whole = read_model_type(tower) not in NUM_CLASS_TOKENS
    weights = join_weights(*sources, is_whole, model, text.vocab_size)
    if "latent_rms" not in overrides:
        config.latent_rms = measure_rms(weights, known_ids)
    added = make_weights(model, projector, seed, cast_to)
    images = load_tower_processor(tower, config.tower_sizes[0])
    processor = LaReProcessor(images, tokenizer, **LaReProcessor.numbers_of(config))
    with replaced_folder(output) as folder:
        write_weights(folder, weights, edit_vocabulary(model, weights, known_ids, added_ids), added, cast_to)
        config.save_pretrained(folder)
        write_generation_config(folder, language, config, tokenizer.pad_token_id)
        processor.save_pretrained(folder)
        copy_legal_files(folder, language)
        copy_legal_files(folder, tower, ".vision_tower")
        if known_answers:
            record_answers(folder, output)
    report_conversion(config, weights, added, text.vocab_size, projector)
    return output


def make_weights(model, projector: str | Path | None, seed: int, cast_to: torch.dtype | None) -> dict[str, Tensor]:
    """The Extractor's weights, and the projector's: the one given, or fresh too."""
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    expected = {name: shape for name, shape in shapes.items() if name.startswith(PROJECTOR)}
    trained = {} if projector is None else load_projector(projector, expected)
    names = [name for name in shapes if name.startswith(("refocus.", PROJECTOR)) and name not in trained]
    added = initialize_weights(model, names, seed, dtype_of_new_weights(model))
    return added | {name: values.to(cast_to) if cast_to else values for name, values in trained.items()}


def edit_vocabulary(model, weights: JoinedWeights, known_ids: list[int], added_ids: list[int]) -> dict[str, Edit]:
    """What changes in the matrices with a row per token: the rows of added tokens, and those that make room."""
    num_rows = model.config.text_config.vocab_size
    extend = partial(extend_vocabulary, num_rows=num_rows, known_ids=known_ids, added_ids=added_ids)
    return {
        name: Edit((num_rows, *weights.entries[name].shape[1:]), extend)
        for name in find_vocabulary_weights(model)
        if name in weights.entries
    }


def report_conversion(config: LaReConfig, weights, added: dict[str, Tensor], rows: int, projector) -> None:
    """List what was copied and what is new."""
    names = f"{config.base_model} and {config.base_vision_tower}"
    report(f"Copied {len(weights.entries)} weights of {names} from {len(weights.files)} files.")
    ids = ", ".join(f"{token} {getattr(config, name)}" for name, token in TOKENS.items())
    report(f"Tokens: {ids}; the vocabulary has {rows} rows and gets {config.text_config.vocab_size}.")
    report(f"The projector is {'fresh: train it first' if projector is None else f'that of {projector}'}.")
    fresh = [values for name, values in added.items() if projector is None or not name.startswith(PROJECTOR)]
    report(f"{len(fresh)} new weights, {sum(values.numel() for values in fresh) / 1e6:.2f}M numbers.")


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--vision-tower", required=True, help="folder or Hub id of a CLIP or SigLIP model")
    parser.add_argument("--language-model", required=True, help="folder or Hub id of a Qwen2, Qwen3 or Llama model")
    parser.add_argument("--projector", help="mm_projector.bin, or folder or Hub id of a llava-hf checkpoint")
    add_converter_options(parser, "the language model")
    return parser


def main() -> None:
    arguments = vars(build_parser().parse_args())
    with exit_on_error():
        arguments["overrides"] = parse_overrides(arguments.pop("set"))
        print(convert_lare(**arguments))


if __name__ == "__main__":
    main()
