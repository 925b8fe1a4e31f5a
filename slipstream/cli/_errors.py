"""What a person sees when a command fails: one sentence, and an exit code that scripts can rely on."""

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from slipstream.errors import SlipstreamError

USER_ERROR = 2  # the same code typer gives to an unknown option
INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # what writing to stdout raises where it leads to a full disk
LONGEST = 1000  # characters of a sentence; a value of the user's may be a megabyte


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a SlipstreamError into `error: …` on stderr and exit code 2; Ctrl-C and `| head` end quietly.

    SLIPSTREAM_DEBUG=1 prints the traceback before the sentence. Any other exception is a bug of ours and passes.
    """
    warnings.formatwarning = lambda message, *_rest: f"warning: {message}\n"  # without a place in our code
    try:
        yield
        sys.stdout.flush()  # here, where a closed pipe can still be caught, rather than at the interpreter's end
    except SlipstreamError as error:
        if os.environ.get("SLIPSTREAM_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        print("error:", _sentence(error), file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        _drop_stdout()
        sys.exit(BROKEN_PIPE)
    except OSError as error:
        if error.errno not in FULL:
            raise
        _drop_stdout()
        print(f"error: The output cannot be written ({error.strerror}); send it elsewhere.", file=sys.stderr)
        sys.exit(USER_ERROR)


def _sentence(error: Exception) -> str:
    """On one line; of a long one the beginning and the end, which says what would work."""
    text = str(error).replace("\n", " ")
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


def _drop_stdout() -> None:
    """The interpreter flushes stdout once more when it ends; let that go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
