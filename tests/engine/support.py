"""Engines with something changed, and everything else made to agree with it."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slipstream.engine.graph import graph_from_json
from slipstream.errors import SlipstreamError

Change = Callable[[dict[str, Any]], Any]


def nothing(values: dict[str, Any]) -> None:
    return None


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = struct.unpack_from("<Q", data)[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def stored_graph(engine: Path) -> dict[str, Any]:
    return json.loads(read_header(engine / "rank0.engine")[0]["__metadata__"]["graph"])


def changed_engine(
    engine: Path, target: Path, *, manifest: Change = nothing, header: Change = nothing, graph: Change = nothing
) -> Path:
    """A copy in which each change was applied; the digest in config.json is that of the changed graph."""
    shutil.copytree(engine, target)
    values, data = read_header(target / "rank0.engine")
    parsed = json.loads(values["__metadata__"]["graph"])
    replaced = graph(parsed)
    values["__metadata__"]["graph"] = json.dumps(parsed if replaced is None else replaced)
    header(values)
    write_header(target / "rank0.engine", values, data)
    config = json.loads((target / "config.json").read_text())
    text = (values.get("__metadata__") or {}).get("graph", "")
    config["graph_sha256"] = digest_of(text) if graph is not nothing else config["graph_sha256"]
    manifest(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def digest_of(text: str) -> str:
    """What a hostile author would write: the right digest wherever the graph can be read at all."""
    try:
        return graph_from_json(text).digest()
    except SlipstreamError:
        return hashlib.sha256(text.encode()).hexdigest()
