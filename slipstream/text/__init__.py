"""Text to token ids and back, for any model folder.

`tokenizer.py` opens a folder; `vocabulary.py` and `sentencepiece.py` make a tokenizer where there is only a raw
vocabulary (GGUF, `tokenizer.model`); `detokenize.py` streams text from token ids and `stop.py` cuts it at stop strings;
`chat.py` turns messages into a prompt, `sandbox.py` bounds what a template may do. No torch, no transformers;
`tokenizers` and `jinja2` are imported when first used.
"""
