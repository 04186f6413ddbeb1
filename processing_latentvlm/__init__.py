"""Processors of the latentvlm architectures, registered with `AutoProcessor`, and pictures of traces."""

from transformers import AutoProcessor

from configuration_latentvlm import DeepLatentConfig
from processing_latentvlm.draw_trace import draw_trace
from processing_latentvlm.processing_deeplatent import DeepLatentProcessor


AutoProcessor.register(DeepLatentConfig, DeepLatentProcessor)

__all__ = ["DeepLatentProcessor", "draw_trace"]
