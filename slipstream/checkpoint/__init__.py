"""Station 1: a model as people have it (a Hugging Face folder, a GGUF file) becomes a checkpoint.

Reads config.json, weights and tokenizer; leaves a folder with `config.json`, `rank0.safetensors` (our names, one
dtype) and `tokenizer/`. A Checkpoint is the same thing not yet written: weights are read from mapped files on demand.
"""

from slipstream.checkpoint.convert import convert, open_checkpoint
from slipstream.checkpoint.folder import Checkpoint
from slipstream.checkpoint.own_model import OwnModel
from slipstream.checkpoint.source import Source, resolve

__all__ = ["Checkpoint", "OwnModel", "Source", "convert", "open_checkpoint", "resolve"]
