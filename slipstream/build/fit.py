"""What of an engine fits on a device, derived before any weight is read: KV tokens, and limits that follow."""

from bisect import bisect_right
from dataclasses import dataclass

from slipstream.engine.graph import Graph
from slipstream.engine.manifest import Manifest
from slipstream.engine.memory import plan_memory
from slipstream.errors import CapacityError, UsageError

# MiB as nvidia-smi reports them in all.
GPUS = {
    "T4-16GB": 15360,
    "V100-16GB": 16384,
    "L4-24GB": 23034,
    "A10-24GB": 23028,
    "RTX3090-24GB": 24576,
    "RTX4090-24GB": 24564,
    "RTX5090-32GB": 32607,
    "V100-32GB": 32768,
    "A100-40GB": 40960,
    "L40S-48GB": 46068,
    "A6000-48GB": 49140,
    "A100-80GB": 81920,
    "H100-80GB": 81559,
    "H20-96GB": 97871,
    "H200-141GB": 143771,
    "B200-180GB": 183359,
}
_CUDA_CONTEXT = 600 << 20  # what CUDA and its libraries take of a GPU before anything is allocated
_MOST_TOKENS = 1 << 20  # in one step; no larger limit is worth deriving


@dataclass(frozen=True)
class Device:
    """Memory to fit into. taken: what is gone before the engine; kv_limit: the most that a KV cache takes unasked."""

    name: str
    memory: int  # bytes
    taken: int = 0
    maps_weights: bool = False  # a CPU reads them from the file's pages, which count as free
    kv_limit: int | None = None


@dataclass(frozen=True)
class Fit:
    """The derivation, each line what is taken (bytes), and what follows from what is left."""

    device: Device
    taken: list[tuple[str, int]]
    left: int  # bytes after all that is taken
    kv_bytes: int
    kv_tokens: int  # in all layers; where windows leave tokens behind, sequences may be longer in sum
    max_batch_size: int  # of sequences of max_seq_len
    max_seq_len: int  # of one sequence alone
    max_num_tokens: int  # beside a KV cache of one such sequence


def gpu(name: str) -> Device:
    """A GPU by its name in GPUS, in any case. Raises UsageError with the names."""
    for known, mebibytes in GPUS.items():
        if known.lower() == name.lower():
            return Device(known, mebibytes << 20, taken=_CUDA_CONTEXT)
    raise UsageError(f"--gpu is {name!r}; the known ones are {', '.join(GPUS)}.")


def fit(graph: Graph, manifest: Manifest, device: Device, fraction: float) -> Fit:
    """What is left for the KV cache, of which it takes `fraction`. Raises CapacityError where nothing is."""
    weights = 0 if device.maps_weights else manifest.memory["weights"]
    taken = [
        ("CUDA and its libraries", device.taken),
        ("weights, which stay in their file" if device.maps_weights else "weights", weights),
        (f"activations of {manifest.max_num_tokens} tokens", manifest.memory["activations"]),
        ("recorded steps", 0 if device.maps_weights else manifest.memory["recorded"]),
    ]
    left = device.memory - sum(size for _, size in taken)
    block_bytes = manifest.kv_block_bytes(manifest.kv_groups)
    kv_bytes = int(max(0, left) * fraction)
    if device.kv_limit is not None:
        kv_bytes = min(kv_bytes, device.kv_limit)
    num_blocks = max(0, kv_bytes // block_bytes - 1)  # one block is nobody's
    kv_tokens = num_blocks // len(manifest.kv_groups) * manifest.tokens_per_block
    sequence = manifest.max_kv_blocks(manifest.max_seq_len) * block_bytes
    room = device.memory - device.taken - weights - int(sequence / fraction)
    found = Fit(
        device, taken, left, kv_bytes,
        kv_tokens=kv_tokens,
        max_batch_size=num_blocks // manifest.max_kv_blocks(manifest.max_seq_len),
        max_seq_len=_longest_sequence(manifest, num_blocks, max(kv_tokens, manifest.max_seq_len)),
        max_num_tokens=_most_tokens(graph, manifest.max_batch_size, room, is_recorded=not device.maps_weights),
    )  # fmt: skip
    if found.kv_tokens == 0:
        fewest = (len(manifest.kv_groups) + 2) * block_bytes
        raise CapacityError(
            _what_would_fit(found, device.memory - device.taken - left + fewest, manifest.max_num_tokens)
        )
    return found


def _longest_sequence(manifest: Manifest, num_blocks: int, high: int) -> int:
    """The most tokens, up to `high`, of a sequence that these blocks hold; windows leave most of it behind."""
    return bisect_right(range(1, high + 1), num_blocks, key=manifest.max_kv_blocks)


def _most_tokens(graph: Graph, max_batch_size: int, room: int, *, is_recorded: bool) -> int:
    """The most tokens of one step whose activations fit, beside those of recorded steps where there are such."""

    def activations(num_tokens: int) -> int:
        memory = plan_memory(graph, max_num_tokens=num_tokens, max_batch_size=max_batch_size)
        return memory["activations"] + (memory["recorded"] if is_recorded else 0)

    return bisect_right(range(1, _MOST_TOKENS + 1), room, key=activations)


def _what_would_fit(found: Fit, needed: int, now: int) -> str:
    """A sentence for a plan that needs so many bytes with max_num_tokens as it is now."""
    larger = next((name for name, size in GPUS.items() if size << 20 >= needed + _CUDA_CONTEXT), None)
    ways = [f"lower --max_num_tokens to {found.max_num_tokens}"] if 0 < found.max_num_tokens < now else []
    ways += [f"take a larger GPU, such as {larger}"] if larger else []
    hint = " or ".join(ways) or "no single GPU known here is large enough, so quantize the model"
    sizes = ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in found.taken if size)
    return f"No KV block fits on {found.device.name} ({found.device.memory / 2**30:.1f} GiB) beside {sizes}; {hint}."
