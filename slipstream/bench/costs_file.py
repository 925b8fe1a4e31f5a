"""The file that slipstream bench steps writes and slipstream simulate reads: an engine's costs, limits and KV cache."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from slipstream.bench.costs import StepCosts
from slipstream.engine.bounded_json import read_json
from slipstream.errors import CorruptFile, SlipstreamError, UsageError
from slipstream.schema.build import CapacityPolicy, QueuePolicy, RuntimeConfig
from slipstream.schema.kv import KVGroup

FORMAT = "slipstream step costs 1"


@dataclass(frozen=True)
class CostsFile:
    model: str
    device: str
    runs_ahead: bool  # the next step is planned while one runs
    runtime: RuntimeConfig
    costs: StepCosts

    def write(self, path: Path) -> None:
        try:
            path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--output {path} cannot be written ({error.strerror}); name another file.") from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises CorruptFile for what slipstream bench steps does not write."""
        if not path.is_file():
            raise UsageError(f"--costs {path} is no file; make one with slipstream bench steps --output {path}.")
        values = read_json(path)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise CorruptFile(f"--costs {path} was not written by this version's slipstream bench steps.")
        try:
            costs = StepCosts.from_dict(values["costs"], str(path))
            runtime = _runtime(dict(values["runtime"]))
            return cls(str(values["model"]), str(values["device"]), bool(values["runs_ahead"]), runtime, costs)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, SlipstreamError):
                raise
            raise CorruptFile(f"--costs {path} does not describe an engine ({error}); measure it again.") from None


def _runtime(values: dict[str, Any]) -> RuntimeConfig:
    groups = tuple(KVGroup(tuple(each["layers"]), each["window"], each["sink_tokens"]) for each in values["kv_groups"])
    policies = {
        "capacity_policy": CapacityPolicy(values["capacity_policy"]),
        "queue_policy": QueuePolicy(values["queue_policy"]),
    }
    config = RuntimeConfig(**(values | {"kv_groups": groups} | policies))
    sizes = (config.num_blocks, config.tokens_per_block, config.max_batch_size, config.max_num_tokens)
    if not groups or not all(type(size) is int and 0 < size < 2**31 for size in (*sizes, config.max_seq_len)):
        raise ValueError("a limit is no whole number above 0")
    return config
