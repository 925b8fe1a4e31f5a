"""Engines with something changed, and everything else made to agree with it; what a compiled one may call."""

import dis
import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from slipstream.engine.graph import graph_from_json
from slipstream.errors import SlipstreamError
from slipstream.kernels.cpu.library import NativeKernel
from slipstream.kernels.registry import known_ops
from slipstream.runtime.worker.native import NativeRun

CPU = torch.device("cpu")
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


def assert_calls_only_ops(step: Any) -> None:
    """The generated function looks nothing up but its own constants, and calls nothing but kernels."""
    assert isinstance(step, FunctionType)
    scope = {name: value for name, value in step.__globals__.items() if name not in ("step", "__builtins__")}
    assert all(re.fullmatch(r"[wkan]\d+(_\d+)?", name) for name in scope)
    assert set(step.__code__.co_names) <= set(scope)
    opcodes = {instruction.opname for instruction in dis.get_instructions(step)}
    assert not {name for name in opcodes if "IMPORT" in name or "ATTR" in name or "METHOD" in name or "CLOSURE" in name}
    kernels = {each.function for op in known_ops().values() for each in op.candidates(CPU, torch.float32).values()}
    called = [value for name, value in scope.items() if name.startswith("k")]
    assert all(value in kernels or set(_choices(value)) <= kernels for value in called)
    native = {each.address for each in kernels if isinstance(each, NativeKernel)}
    runs = [value for name, value in scope.items() if name.startswith("n")]
    assert all(isinstance(run, NativeRun) and set(run.kernels) <= native for run in runs)
    assert not any(callable(value) for name, value in scope.items() if name[0] not in "kn")


def _choices(choose: Any) -> list[Any]:
    """The kernels of an op, of which the number of rows picks one."""
    assert isinstance(choose, FunctionType) and choose.__closure__ is not None
    (functions,) = (cell.cell_contents for cell in choose.__closure__)
    return functions
