"""Read a llama-architecture GGUF file as the text tower, the text config and the tokenizer of a Qwen2.5-VL model.

A Llama decoder is a Qwen2 decoder whose q/k/v biases are zero, so the weights fit by renaming, once two things that
llama.cpp does are undone: it quantises the matrices, and it reorders the rows of q and k, because its rotary embedding
turns neighbouring pairs (2i, 2i + 1) where transformers turns the halves (i, i + H/2).

Shapes: N heads, H head dim, D hidden size.
"""

import importlib.util
import re
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm


ARCHITECTURE = "llama"
# The only pre-tokenizer rebuilt here; another one would split text differently without any error.
PRE_TOKENIZER = "smollm"
CONTROL_TOKEN = 3  # `gguf.TokenType.CONTROL`

MODEL_NAMES = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def require_gguf() -> None:
    """Check for the optional `gguf` package before anything slow starts.

    Raises:
        ImportError: it is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("Reading a GGUF file needs the package `gguf`: `pip install --no-deps gguf==0.19.0`.")


def read_gguf(path: Path) -> tuple[dict, list]:
    """Open a GGUF file: its metadata by key, and its tensors (name, data, type), still quantised and on disk.

    Raises:
        ValueError: the file holds another architecture than Llama.
    """
    require_gguf()
    from gguf import GGUFReader

    reader = GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(f"`general.architecture` must be {ARCHITECTURE!r}, got {architecture!r} in {path}.")
    return metadata, reader.tensors


def build_text_config(metadata: dict) -> dict:
    """Translate GGUF metadata into the fields of `Qwen2_5_VLTextConfig`."""
    sizes = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    head_size = sizes["embedding_length"] // sizes["attention.head_count"]
    # Time, height and width share the rotary frequencies 2 : 3 : 3, as in every Qwen2-VL and Qwen2.5-VL.
    # For text the three positions are equal and the split has no effect.
    mrope_section = [head_size // 8, 3 * head_size // 16, 3 * head_size // 16]
    return {
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": sizes["embedding_length"],
        "intermediate_size": sizes["feed_forward_length"],
        "num_hidden_layers": sizes["block_count"],
        "num_attention_heads": sizes["attention.head_count"],
        "num_key_value_heads": sizes["attention.head_count_kv"],
        "max_position_embeddings": sizes["context_length"],
        # Stored as float32, where 1e-5 reads 9.999999747e-06.
        "rms_norm_eps": float(f"{sizes['attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": sizes["rope.freq_base"],
            "mrope_section": mrope_section,
        },
        "tie_word_embeddings": True,
    }


def convert_name(name: str) -> str:
    """Give the transformers name of a GGUF tensor, relative to the text tower.

    Raises:
        ValueError: a tied Llama has no tensor of this name.
    """
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if layer and layer[2] in LAYER_NAMES:
        return f"layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.weight"
    if name not in MODEL_NAMES:
        raise ValueError(f"Expected the tensors of a Llama with tied embeddings, got an unexpected one: `{name}`.")
    return MODEL_NAMES[name]


def undo_rope_permutation(
    weight: Tensor,  # (N * H, D), rows of a head in llama.cpp's order: 0, H/2, 1, H/2 + 1, ...
    num_heads: int,
) -> Tensor:  # (N * H, D), rows of a head in transformers' order
    """Restore the row order of a q or k projection (the inverse of `permute` in llama.cpp's convert_hf_to_gguf.py)."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def convert_state_dict(tensors: list, text_config: dict) -> dict[str, Tensor]:
    """Dequantise the tensors of `read_gguf` to float32 under their transformers names."""
    from gguf.quants import dequantize

    num_heads = {"attn_q": text_config["num_attention_heads"], "attn_k": text_config["num_key_value_heads"]}
    state_dict = {}
    for tensor in tqdm(tensors, desc="Dequantising", unit="tensor"):
        name = convert_name(tensor.name)
        # Copied: an unquantised tensor comes as a read-only view of the file, which is deleted later.
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        role = tensor.name.split(".")[-2]
        state_dict[name] = undo_rope_permutation(weight, num_heads[role]) if role in num_heads else weight
    return state_dict


def load_language_weights(language_model: torch.nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Copy `state_dict` into a Qwen2.5-VL text tower and zero the biases a Llama does not have.

    Raises:
        ValueError: a name is missing or unexpected.
    """
    expected = set(language_model.state_dict())
    biases = {name for name in expected if re.fullmatch(r"layers\.\d+\.self_attn\.[qkv]_proj\.bias", name)}
    missing = expected - biases - set(state_dict)
    unexpected = set(state_dict) - (expected - biases)
    if missing or unexpected:
        raise ValueError(
            f"The GGUF tensors must be those of a {language_model.config.num_hidden_layers}-layer Llama: "
            f"missing {sorted(missing)}, unexpected {sorted(unexpected)}."
        )
    zeros = {name: torch.zeros_like(language_model.get_parameter(name)) for name in biases}
    language_model.load_state_dict({**state_dict, **zeros})


def build_tokenizer(metadata: dict, renamed: dict[int, str]) -> Tokenizer:
    """Rebuild the byte-level BPE tokenizer of SmolLM from its GGUF metadata.

    Args:
        renamed: new text for control tokens that training left unused, by id.

    Raises:
        ValueError: the file names another pre-tokenizer, or a renamed id is no control token.
    """
    pre_tokenizer = metadata.get("tokenizer.ggml.pre")
    if pre_tokenizer != PRE_TOKENIZER:
        raise ValueError(f"`tokenizer.ggml.pre` must be {PRE_TOKENIZER!r}, got {pre_tokenizer!r}.")
    tokens = list(metadata["tokenizer.ggml.tokens"])
    control_ids = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == CONTROL_TOKEN]
    for token_id, token in renamed.items():
        if token_id not in control_ids:
            raise ValueError(f"Only control tokens can be renamed, but id {token_id} (for `{token}`) is none.")
        tokens[token_id] = token
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # transformers' own `gguf_file=` route forgets `Digits`, and then splits "a  1" differently from the original.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in control_ids])
    return tokenizer
