"""Every exception Slipstream raises for a mistake that is not its own.

    SlipstreamError
    ├── ModelError            a model folder, GGUF file or checkpoint that cannot be used
    │   ├── UnsupportedModel  an architecture or option nobody here knows; the message lists the known ones
    │   └── CorruptFile       truncated, hostile or inconsistent bytes
    ├── BuildError            a checkpoint that could not become an engine
    ├── EngineError           an engine folder that cannot be run
    ├── RequestError          a prompt or sampling value out of range (also a ValueError)
    ├── CapacityError         something does not fit in memory; the message names the flag and a value that fits
    ├── RankError             one of the processes that share a model is gone or hangs; the engine has stopped
    └── UsageError            a command line that means nothing

Each message is one sentence that names the offending value and one that would work. The command line prints it
without a traceback and exits with code 2.
"""


class SlipstreamError(Exception):
    """Base of all errors above."""


class ModelError(SlipstreamError):
    """A model folder, GGUF file or checkpoint cannot be used."""


class UnsupportedModel(ModelError):
    """The architecture or one of its options is not implemented."""


class CorruptFile(ModelError):
    """A file is truncated, hostile or contradicts itself."""


class BuildError(SlipstreamError):
    """A checkpoint could not be built into an engine."""


class EngineError(SlipstreamError):
    """An engine folder cannot be run."""


class RequestError(SlipstreamError, ValueError):
    """A request was refused: the prompt or a sampling value is out of range."""


class CapacityError(SlipstreamError):
    """Something does not fit in memory."""


class RankError(SlipstreamError):
    """One of the processes that share a model is gone, or answers no more."""


class UsageError(SlipstreamError):
    """A command line combines flags in a way that means nothing."""


def in_words(error: BaseException) -> str:
    """What went wrong: a sentence of ours, or of others' errors the kind as well."""
    return str(error) if isinstance(error, SlipstreamError) else f"{type(error).__name__}: {error}"
