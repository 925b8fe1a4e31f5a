"""The tokenizer travels with the weights: copied as files, or written out of a GGUF's vocabulary."""

import shutil
from pathlib import Path

from slipstream.checkpoint.gguf import TokenizerFacts
from slipstream.errors import UnsupportedModel
from slipstream.text import vocabulary

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy what there is; a model without a tokenizer still runs on token ids."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)


def write_gguf_tokenizer(facts: TokenizerFacts, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json from the vocabulary inside a GGUF file."""
    if facts.model == "gpt2":
        tokenizer = vocabulary.bpe_tokenizer(
            facts.tokens, facts.merges or [], facts.pre or "default", token_types=facts.token_types,
            bos_id=facts.bos_token_id, eos_id=facts.eos_token_id, add_bos=facts.add_bos,
        )  # fmt: skip
    elif facts.model == "llama":
        tokenizer = vocabulary.spm_tokenizer(
            facts.tokens, facts.scores or [0.0] * len(facts.tokens), facts.token_types,
            unk_id=facts.unk_token_id or 0, bos_id=facts.bos_token_id, eos_id=facts.eos_token_id,
            add_bos=facts.add_bos is not False, add_dummy_prefix=facts.add_space_prefix is not False,
        )  # fmt: skip
    else:
        raise UnsupportedModel(f"tokenizer.ggml.model is {facts.model!r}; the known ones are gpt2 and llama.")
    vocabulary.save(
        tokenizer, folder, bos_token=_token(facts, facts.bos_token_id), eos_token=_token(facts, facts.eos_token_id),
        chat_template=facts.chat_template,
    )  # fmt: skip


def _token(facts: TokenizerFacts, token_id: int | None) -> str | None:
    return None if token_id is None else facts.tokens[token_id]
