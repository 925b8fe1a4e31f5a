"""What slipstream build says of memory before any weight is read."""

from typing import TYPE_CHECKING

from slipstream.cli._tables import print_memory_plan, print_ranks, print_table
from slipstream.schema.units import human_bytes

if TYPE_CHECKING:
    import torch

    from slipstream.build import BuildPlan
    from slipstream.build.fit import Device

KV_FRACTION = 0.9  # of what is left, as run takes by default


def print_plan(plan: "BuildPlan") -> None:
    manifest = plan.manifest
    print(
        f"{manifest.name}: {manifest.model_type} in {manifest.dtype}, at most {manifest.max_batch_size} "
        f"sequences and {manifest.max_num_tokens} tokens a step, {manifest.max_seq_len} tokens a sequence\n"
    )
    print_ranks(manifest)
    print_memory_plan(manifest.of_rank(_fullest(plan)))


def print_fit(plan: "BuildPlan", device: "Device") -> None:
    """The derivation of what fits, a line a step. Raises CapacityError where nothing does."""
    from slipstream.build.fit import fit

    rank = _fullest(plan)
    manifest = plan.manifest.of_rank(rank)
    found = fit(plan.ranks[rank].graph, manifest, device, KV_FRACTION)
    limit = f", {human_bytes(device.kv_limit)} at most" if device.kv_limit is not None else ""
    kept = ", as far as windows keep them" if any(manifest.windows) else ""
    rows: list[tuple[str, str]] = [
        ("memory", human_bytes(device.memory)),
        *((f"- {name}", human_bytes(size)) for name, size in found.taken if size or "CUDA" not in name),
        ("= left", human_bytes(found.left)),
        (f"× {KV_FRACTION:g} for the KV cache{limit}", human_bytes(found.kv_bytes)),
        (f"÷ {human_bytes(manifest.kv_bytes_per_token)} a token", f"{found.kv_tokens} tokens"),
        (f"÷ {manifest.max_seq_len} tokens of the longest sequence{kept}", f"{found.max_batch_size} such sequences"),
    ]
    print_table(f"What fits on {device.name}", (), rows)
    limits = [
        ("--max_batch_size", manifest.max_batch_size, found.max_batch_size, "sequences of --max_seq_len"),
        ("--max_num_tokens", manifest.max_num_tokens, found.max_num_tokens, "beside the KV cache of one such sequence"),
        ("--max_seq_len", manifest.max_seq_len, found.max_seq_len, "one sequence alone; a model has its own limit"),
    ]  # fmt: skip
    print_table("Limits", ("limit", "now", "fits", "of what"), limits)


def _fullest(plan: "BuildPlan") -> int:
    """The rank with the most weights."""
    return max(range(len(plan.ranks)), key=lambda rank: plan.ranks[rank].memory["weights"])


def this_machine(where: "torch.device") -> "Device":
    from slipstream.build.fit import Device
    from slipstream.runtime.worker.memory import CPU_KV_LIMIT, free_memory

    if where.type == "cpu":
        return Device("the CPU now", free_memory(where), maps_weights=True, kv_limit=CPU_KV_LIMIT)
    return Device(f"{where} now", free_memory(where))
