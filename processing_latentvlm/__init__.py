"""Processors of the latentvlm architectures, registered with `AutoProcessor`, and pictures of traces."""

from transformers import AutoProcessor

import configuration_latentvlm  # noqa: F401
from processing_latentvlm.draw_trace import draw_trace
from processing_latentvlm.processing_deeplatent import DeepLatentProcessor
from processing_latentvlm.processing_lare import LaReProcessor
from processing_latentvlm.processing_vedas import VedasProcessor


for processor_class in (DeepLatentProcessor, LaReProcessor, VedasProcessor):
    AutoProcessor.register(processor_class.config_class, processor_class)

__all__ = ["DeepLatentProcessor", "LaReProcessor", "VedasProcessor", "draw_trace"]
