"""Read by the schemathesis command. Of any name that is not served there is little to be learnt."""

from typing import Any

import schemathesis


@schemathesis.hook
def map_path_parameters(_context: Any, parameters: Any) -> Any:
    known = {"name": "talker", "version": "1"}
    return {name: known.get(name, value) for name, value in (parameters or {}).items()}


@schemathesis.hook
def map_body(_context: Any, body: Any) -> Any:
    return body | {"model": "talker"} if isinstance(body, dict) and isinstance(body.get("model"), str) else body
