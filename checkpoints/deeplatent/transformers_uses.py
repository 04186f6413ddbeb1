"""Every private, overridden or wrapped thing of other libraries that this code relies on, by the part that needs it.

`transformers_contract.py` compares it with what is installed. A test compares it with the code: an override or a private
access that is not declared here fails.
"""

from .transformers_api import CACHE
from .transformers_contract import Use


_QWEN_2_5 = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
_QWEN_2 = "transformers.models.qwen2_vl.modeling_qwen2_vl"
_LLAVA = "transformers.models.llava.modeling_llava"
_LAYER = ("hidden_states", "attention_mask", CACHE, "use_cache", "position_embeddings")
_TEXT_MODEL = ("inputs_embeds", "attention_mask", "position_ids", CACHE, "use_cache")
_ROPE_INDEX = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
_ATTENTION = ("module", "query", "key", "value", "attention_mask", "scaling", "dropout")
# An attention layer finds its kernel by the name that its own `config` has (`saliency.RecordingConfig`).
_DISPATCH = {"forward": ("config", "_attn_implementation", "get_interface")}
_IMAGES, _VIDEOS = ("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")

_CONFIGURATION = (
    Use(
        "transformers.configuration_utils:PreTrainedConfig",
        hooks={
            "to_dict": (),
            "to_json_file": ("json_file_path",),
            "get_text_config": (),
            "get_config_dict": ("pretrained_model_name_or_path",),
        },
        attributes=("model_type", "attribute_map", "__post_init__"),
        callers={"save_pretrained": ("to_json_file",)},
    ),
    Use("huggingface_hub.dataclasses:strict"),
    Use("transformers.models.qwen2_5_vl.configuration_qwen2_5_vl:Qwen2_5_VLConfig", attributes=("validate",)),
    Use("transformers.models.llava.configuration_llava:LlavaConfig", attributes=("validate",)),
)

_CACHED_FILES = Use(
    "transformers.utils.hub:cached_files",
    parameters=(
        "filenames",
        "_raise_exceptions_for_gated_repo",
        "_raise_exceptions_for_missing_entries",
        "_raise_exceptions_for_connection_errors",
    ),
)

_PROCESSING = (
    _CACHED_FILES,
    Use("transformers.image_utils:httpx", attributes=("stream", "HTTPError", "InvalidURL")),  # httpx or httpx2
    Use(
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl:smart_resize",
        parameters=("height", "width", "factor", "min_pixels", "max_pixels"),
    ),
    Use(
        "transformers.processing_utils:ProcessorMixin",
        hooks={
            "__call__": ("images", "text", "videos"),
            "to_dict": (),
            "to_json_file": ("json_file_path",),
            "apply_chat_template": ("conversation",),
            "get_processor_dict": ("pretrained_model_name_or_path",),
        },
        attributes=("model_input_names",),
        callers={"save_pretrained": ("to_json_file",), "from_pretrained": ("get_processor_dict",)},
    ),
    Use(
        "transformers.models.qwen2_5_vl.processing_qwen2_5_vl:Qwen2_5_VLProcessor",
        hooks={"__call__": ("images", "text", "videos"), "replace_image_token": ("image_inputs", "image_idx")},
    ),
    Use(
        "transformers.models.llava.processing_llava:LlavaProcessor",
        hooks={"__call__": ("images", "text"), "replace_image_token": ("image_inputs", "image_idx")},
    ),
)

_GENERATION_HOOKS = {
    "generate": ("inputs", "generation_config", "logits_processor", "stopping_criteria", "assistant_model"),
    "prepare_inputs_for_generation": (
        "input_ids",
        "next_sequence_length",
        CACHE,
        "attention_mask",
        "inputs_embeds",
        "is_first_iteration",
    ),
    "_prepare_position_ids_for_generation": ("inputs_tensor", "model_kwargs"),
    "_update_model_kwargs_for_generation": ("outputs", "model_kwargs"),
    "_valid_auto_compile_criteria": ("model_kwargs", "generation_config"),
    "_prepare_cache_for_generation": (
        "generation_config",
        "model_kwargs",
        "generation_mode",
        "batch_size",
        "max_cache_length",
    ),
    "_prepare_generation_config": ("generation_config",),
    "generate_batch": ("inputs",),
    "_sample": ("input_ids", "logits_processor", "stopping_criteria", "generation_config"),
    "_beam_search": ("input_ids", "logits_processor", "stopping_criteria", "generation_config"),
}

_MODELING = (
    Use(
        "transformers.generation.utils:GenerationMixin",
        hooks=_GENERATION_HOOKS,
        callers={
            "generate": (
                "_prepare_generation_config",
                "_prepare_cache_for_generation",
                "_prepare_position_ids_for_generation",
            ),
            "_sample": (
                "prepare_inputs_for_generation",
                "_update_model_kwargs_for_generation",
                "_valid_auto_compile_criteria",
            ),
            "_beam_search": (
                "prepare_inputs_for_generation",
                "_update_model_kwargs_for_generation",
                "_reorder_cache",
            ),
        },
    ),
    Use(
        "transformers.modeling_utils:PreTrainedModel",
        hooks={
            "from_pretrained": ("pretrained_model_name_or_path", "ignore_mismatched_sizes"),
            "_init_weights": ("module",),
            "_upload_modified_files": ("working_dir", "repo_id", "files_timestamps"),
            "_set_gradient_checkpointing": ("enable", "gradient_checkpointing_func"),
        },
        attributes=(
            "config_class",
            "base_model",
            "_keep_in_fp32_modules",
            "_can_record_outputs",
            "_no_split_modules",
            "_skip_keys_device_placement",
            "_supports_flex_attn",
            "_tied_weights_keys",
        ),
        callers={
            "_set_gradient_checkpointing": ("_gradient_checkpointing_func", "gradient_checkpointing"),
            "_initialize_weights": ("_init_weights",),
            "push_to_hub": ("save_pretrained", "_upload_modified_files"),
            "save_pretrained": ("_upload_modified_files",),
        },
    ),
    Use(
        "transformers.modeling_utils:PreTrainedModel.save_pretrained",
        parameters=("save_directory", "is_main_process", "state_dict", "push_to_hub"),
    ),
    Use("transformers.modeling_utils:AttentionInterface", hooks={"register": ("key", "value")}),
    Use(
        "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS.get_interface",
        parameters=("attn_implementation", "default"),
    ),
    Use("transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS.valid_keys"),
    Use(
        "transformers.masking_utils:create_causal_mask",
        parameters=("config", "inputs_embeds", "attention_mask", CACHE, "position_ids"),
    ),
    Use("transformers.integrations.sdpa_attention:sdpa_attention_forward", parameters=_ATTENTION),
    Use(
        "transformers.configuration_utils:PreTrainedConfig",
        attributes=("_attn_implementation",),
        instance_attributes=("_name_or_path",),
    ),
    Use("transformers.utils.output_capturing:_CAN_RECORD_REGISTRY"),
    Use("torch.nn:Module", instance_attributes=("_forward_hooks",)),
    Use(
        "transformers.utils.output_capturing:maybe_install_capturing_hooks",
        mentions=("_output_capturing_hooks_installed",),
    ),
    Use("transformers.utils:ModelOutput", attributes=("get", "__getitem__", "__contains__")),
    Use("transformers.integrations.accelerate:accelerate_dispatch", mentions=("_skip_keys_device_placement",)),
    Use(
        "transformers.modeling_layers:GradientCheckpointingLayer",
        attributes=("gradient_checkpointing", "_can_checkpoint_with_cache"),
    ),
    Use(
        "transformers.cache_utils:Cache",
        parameters=("layers",),
        hooks={
            "update": ("key_states", "value_states", "layer_idx"),
            "get_seq_length": (),
            "reorder_cache": ("beam_idx",),
            "batch_repeat_interleave": ("repeats",),
            "crop": (),
        },
    ),
    Use("transformers.cache_utils:DynamicCache", parameters=("config",)),
    Use(
        "transformers.cache_utils:DynamicLayer",
        hooks={"update": ("key_states", "value_states"), "get_seq_length": ()},
        instance_attributes=("keys", "values", "is_initialized"),
    ),
    Use("transformers.cache_utils:StaticLayer", parameters=("max_cache_len",)),
    Use("transformers.modeling_outputs:CausalLMOutputWithPast", parameters=("loss", "logits", CACHE, "hidden_states")),
    Use(
        "transformers.generation.utils:GenerateDecoderOnlyOutput", parameters=("sequences", "scores", "logits", CACHE)
    ),
    Use(
        "transformers.generation.utils:GenerateBeamDecoderOnlyOutput", parameters=("sequences", "beam_indices", CACHE)
    ),
    Use("transformers.generation.logits_process:LogitsProcessor", hooks={"__call__": ("input_ids", "scores")}),
    Use("transformers.generation.stopping_criteria:StoppingCriteria", hooks={"__call__": ("input_ids", "scores")}),
    Use(
        "transformers.generation.stopping_criteria:StopStringCriteria",
        parameters=("tokenizer", "stop_strings"),
        hooks={"__call__": ("input_ids", "scores")},
    ),
    Use(
        "transformers.generation.configuration_utils:GenerationConfig",
        hooks={"get_generation_mode": ("assistant_model",)},
    ),
    _CACHED_FILES,
    Use("transformers.initialization:normal_", parameters=("tensor", "std")),
    Use("transformers.utils:can_return_tuple"),
)

_RENAMED_WEIGHTS = (
    Use("transformers.conversion_mapping:get_checkpoint_conversion_mapping", parameters=("model_type",)),
    Use("transformers.conversion_mapping:register_checkpoint_conversion_mapping", parameters=("mapping", "overwrite")),
)

_DEEPLATENT = (
    Use(
        f"{_QWEN_2_5}:Qwen2_5_VLForConditionalGeneration",
        hooks={
            **_GENERATION_HOOKS,
            "forward": (
                "input_ids",
                "attention_mask",
                "position_ids",
                CACHE,
                "inputs_embeds",
                "labels",
                "use_cache",
                "mm_token_type_ids",
                "logits_to_keep",
                *_IMAGES,
                *_VIDEOS,
                "second_per_grid_ts",
            ),
        },
    ),
    Use(
        f"{_QWEN_2_5}:Qwen2_5_VLModel",
        hooks={
            "get_image_features": _IMAGES,
            "get_video_features": _VIDEOS,
            "get_rope_index": (*_ROPE_INDEX, "second_per_grid_ts"),
        },
    ),
    Use(f"{_QWEN_2_5}:Qwen2_5_VLTextModel", hooks={"forward": _TEXT_MODEL}),
    Use(f"{_QWEN_2_5}:Qwen2_5_VLDecoderLayer", hooks={"forward": _LAYER}),
)

_VEDAS = (
    Use(f"{_QWEN_2_5}:Qwen2_5_VLPreTrainedModel", hooks={"_init_weights": ("module",)}),
    Use(
        f"{_QWEN_2_5}:Qwen2_5_VLModel",
        hooks={
            "get_image_features": _IMAGES,
            "get_video_features": _VIDEOS,
            "get_rope_index": (*_ROPE_INDEX, "second_per_grid_ts"),
        },
    ),
    Use(
        f"{_QWEN_2}:Qwen2VLModel",
        hooks={"get_image_features": _IMAGES, "get_video_features": _VIDEOS, "get_rope_index": _ROPE_INDEX},
    ),
    Use(f"{_QWEN_2_5}:Qwen2_5_VLTextModel", hooks={"forward": _TEXT_MODEL}),
    Use(f"{_QWEN_2}:Qwen2VLTextModel", hooks={"forward": _TEXT_MODEL}),
    Use(f"{_QWEN_2_5}:Qwen2_5_VLDecoderLayer", parameters=("config", "layer_idx"), hooks={"forward": _LAYER}),
    Use(f"{_QWEN_2}:Qwen2VLDecoderLayer", parameters=("config", "layer_idx"), hooks={"forward": _LAYER}),
    Use(f"{_QWEN_2_5}:Qwen2_5_VLAttention", parameters=("config", "layer_idx"), callers=_DISPATCH),
    Use(f"{_QWEN_2}:Qwen2VLAttention", parameters=("config", "layer_idx"), callers=_DISPATCH),
    Use(f"{_QWEN_2_5}:eager_attention_forward", parameters=_ATTENTION),
    Use(f"{_QWEN_2}:eager_attention_forward", parameters=_ATTENTION),
)

_LARE = (
    Use(f"{_LLAVA}:LlavaPreTrainedModel", hooks={"_init_weights": ("module",)}),
    Use(f"{_LLAVA}:LlavaModel", hooks={"get_image_features": ("pixel_values",)}),
)

_ADAPTERS = (
    Use("peft:get_peft_model", parameters=("model", "peft_config")),
    Use("peft:LoraConfig", parameters=("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")),
    Use("peft:PeftModel", hooks={"get_base_model": (), "save_pretrained": ("save_directory",)}),
    Use("peft.tuners.tuners_utils:BaseTuner", hooks={"merge_and_unload": ()}),
)

# By `model_type` of the language model; a LaRe model compares that of its own when it is built.
_LANGUAGE_MODELS = {
    name: (
        Use(f"transformers.models.{name}.modeling_{name}:{title}Model", hooks={"forward": _TEXT_MODEL}),
        Use(f"transformers.models.{name}.modeling_{name}:{title}DecoderLayer", hooks={"forward": _LAYER}),
        Use(f"transformers.models.{name}.modeling_{name}:{title}Attention", callers=_DISPATCH),
        Use(f"transformers.models.{name}.modeling_{name}:eager_attention_forward", parameters=_ATTENTION),
    )
    for name, title in (("llama", "Llama"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
}

_TRAINING = (
    Use(
        "transformers.trainer:Trainer",
        hooks={
            "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
            "training_step": ("model", "inputs", "num_items_in_batch"),
            "_init_training_state": ("max_steps", "num_update_steps_per_epoch", "num_train_epochs"),
            "create_scheduler": ("num_training_steps", "optimizer"),
            "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
            "floating_point_ops": ("inputs",),
            "log": ("logs",),
            "save_model": ("output_dir", "_internal_call"),
            "create_model_card": (),
            "_save": ("output_dir", "state_dict"),
            "_clip_grad_norm": ("model",),
            "_get_grad_norm": ("model",),
            "_get_train_sampler": ("train_dataset",),
            "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
            "_load_best_model": (),
            "_save_optimizer_and_scheduler": ("output_dir",),
            "_load_optimizer_and_scheduler": ("checkpoint",),
        },
        called=(
            "_clip_grad_norm",
            "_get_grad_norm",
            "_get_train_sampler",
            "_load_best_model",
            "_load_from_checkpoint",
            "_load_optimizer_and_scheduler",
            "compute_loss",
            "create_model_card",
            "create_scheduler",
            "floating_point_ops",
            "get_batch_samples",
            "log",
            "training_step",
        ),
        callers={
            "prediction_step": ("keys_to_ignore_at_inference",),
            "save_model": ("_save",),
            "_inner_training_loop": ("_init_training_state",),
            "_save_checkpoint": ("save_model", "_save_optimizer_and_scheduler"),
        },
    ),
    Use(
        "transformers.trainer_callback:TrainerCallback",
        hooks={
            "on_train_begin": ("args", "state", "control"),
            "on_train_end": ("args", "state", "control"),
            "on_epoch_begin": ("args", "state", "control"),
            "on_epoch_end": ("args", "state", "control"),
            "on_evaluate": ("args", "state", "control"),
            "on_step_begin": ("args", "state", "control"),
            "on_pre_optimizer_step": ("args", "state", "control"),
            "on_save": ("args", "state", "control"),
        },
    ),
    Use(
        "transformers.training_args:TrainingArguments",
        attributes=(
            "__post_init__",
            "gradient_accumulation_steps",
            "learning_rate",
            "logging_steps",
            "lr_scheduler_type",
            "num_train_epochs",
            "per_device_train_batch_size",
            "remove_unused_columns",
            "warmup_steps",
            "weight_decay",
        ),
    ),
)

_ACCELERATE = (
    Use(
        "accelerate:Accelerator",
        hooks={
            "autocast": (),
            "backward": ("loss",),
            "clip_grad_norm_": ("parameters", "max_norm"),
            "no_sync": ("model",),
            "reduce": ("tensor", "reduction"),
            "unwrap_model": ("model", "keep_torch_compile"),
        },
        attributes=("num_processes", "process_index"),
    ),
    Use("accelerate.utils:gather_object"),
)

USES: dict[str, tuple[Use, ...]] = {
    "configuration": _CONFIGURATION,
    "processing": _PROCESSING,
    "deeplatent": (*_MODELING, *_RENAMED_WEIGHTS, *_DEEPLATENT),
    "lare": (*_MODELING, *_LARE),
    "vedas": (*_MODELING, *_RENAMED_WEIGHTS, *_VEDAS),
    "training": (*_TRAINING, *_ACCELERATE),
    "adapters": _ADAPTERS,
    **{f"lare with {name}": uses for name, uses in _LANGUAGE_MODELS.items()},
}
