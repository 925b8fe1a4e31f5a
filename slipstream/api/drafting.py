"""The engine of a draft model, opened beside its target's: built if need be, and of the same vocabulary."""

import torch

from slipstream.api.building import BuildOptions, engine_path
from slipstream.build.cache import tuned_choices
from slipstream.checkpoint import resolve
from slipstream.engine.choices import Choices
from slipstream.engine.folder import Engine, open_engine
from slipstream.engine.manifest import Manifest
from slipstream.errors import UsageError
from slipstream.schema.speculative import Speculation
from slipstream.speculative.head_file import head_folder
from slipstream.text.tokenizer import Tokenizer


def open_draft_engine(
    speculation: Speculation, options: BuildOptions, device: torch.device, target: Manifest,
    tokenizer: Tokenizer | None, *, show_progress: bool,
) -> tuple[Engine, Choices] | None:  # fmt: skip
    """None where the method drafts without a model. options: how one that is no engine yet is built.

    tokenizer: the target's. Raises UsageError where the draft model has another vocabulary.
    """
    model = speculation.options.get("model", "")
    if speculation.method != "draft_model" or not isinstance(model, str):
        return None  # the drafter says what a model is
    model = str(head_folder("draft_model", model, target.name))
    engine = open_engine(engine_path(resolve(model), options, device, show_progress=show_progress))
    if engine.manifest.num_ranks > 1:
        raise UsageError(
            f"The draft model {model} was built for {engine.manifest.num_ranks} ranks, but one drafts for all; build "
            "it with --tp_size 1."
        )
    _check_vocabulary(model, engine, target, tokenizer)
    return engine, tuned_choices(engine, device)


def _check_vocabulary(model: str, draft: Engine, target: Manifest, tokenizer: Tokenizer | None) -> None:
    advice = "drafts need one vocabulary, so take a smaller model of the same family, or the method ngram"
    folder = draft.tokenizer_folder
    if tokenizer is None or folder is None:
        if draft.manifest.vocab_size != target.vocab_size:
            raise UsageError(
                f"The draft model {model} has {draft.manifest.vocab_size} tokens and the model {target.vocab_size}; "
                f"{advice}."
            )
        return
    own = Tokenizer.open(folder)
    for token_id in range(max(own.vocab_size, tokenizer.vocab_size)):
        drafts, verifies = own.token(token_id), tokenizer.token(token_id)
        if drafts != verifies:
            raise UsageError(
                f"Token {token_id} is {drafts!r} to the draft model {model} and {verifies!r} to the model; {advice}."
            )
