"""slipstream triton fill-template: values for the ${keys} of a config.pbtxt."""

from pathlib import Path
from typing import Annotated

import typer

from slipstream.errors import UsageError


def fill_template(
    file: Annotated[Path, typer.Argument(help="A config.pbtxt with ${keys}.")],
    substitutions: Annotated[str, typer.Argument(help='KEY:VALUE,KEY:VALUE; a value with commas as KEY:"A,B".')],
    in_place: Annotated[
        bool, typer.Option("--in_place", "-i", help="Write into the file, instead of to stdout.")
    ] = False,
) -> None:
    """Fill in keys of a config.pbtxt, as tools/fill_template.py of tensorrtllm_backend does.

    A key that the file does not have is refused.

    Example:
        slipstream triton fill-template -i repository/ensemble/config.pbtxt triton_max_batch_size:64
    """
    from slipstream.serve.triton.template import fill, parse_substitutions

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{file} cannot be read ({getattr(error, 'strerror', None) or error}); name a config.pbtxt."
        ) from None
    filled = fill(text, parse_substitutions(substitutions), str(file))
    if not in_place:
        print(filled, end="")
        return
    try:
        file.write_text(filled, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be written ({error.strerror}); leave -i out to print.") from None
