"""What a person sees when a command fails: one sentence, and an exit code that scripts can rely on."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from slipstream.errors import SlipstreamError

USER_ERROR = 2  # the same code typer gives to an unknown option
INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a SlipstreamError into `error: …` on stderr and exit code 2; Ctrl-C and `| head` end quietly.

    SLIPSTREAM_DEBUG=1 prints the traceback before the sentence. Any other exception is a bug of ours and passes.
    """
    try:
        yield
        sys.stdout.flush()  # here, where a closed pipe can still be caught, rather than at the interpreter's end
    except SlipstreamError as error:
        if os.environ.get("SLIPSTREAM_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        print("error:", str(error).replace("\n", " "), file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
