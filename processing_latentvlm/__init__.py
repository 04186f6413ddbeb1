"""Processors of the latentvlm architectures, registered with `AutoProcessor`, and pictures of traces."""

from transformers import AutoProcessor

from configuration_latentvlm import DeepLatentConfig, LaReConfig, VedasConfig
from processing_latentvlm.draw_trace import draw_trace
from processing_latentvlm.processing_deeplatent import DeepLatentProcessor
from processing_latentvlm.processing_lare import LaReProcessor
from processing_latentvlm.processing_vedas import VedasProcessor


AutoProcessor.register(DeepLatentConfig, DeepLatentProcessor)
AutoProcessor.register(LaReConfig, LaReProcessor)
AutoProcessor.register(VedasConfig, VedasProcessor)

__all__ = ["DeepLatentProcessor", "LaReProcessor", "VedasProcessor", "draw_trace"]
