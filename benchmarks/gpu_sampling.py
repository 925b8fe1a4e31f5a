"""Times slipstream/kernels/triton/sampling.py on this GPU: python benchmarks/gpu_sampling.py

First tokens are compared with those of the CPU. Then calls are recorded into a CUDA graph and replayed, over logits
that the L2 holds where they fit, as after a step's last product. "torch" is kernels/sampling.py's reference on the GPU:
not recorded (it waits for values), so its time includes its launches. "like a model": few tokens hold most of the mass;
"flat": normal logits, where top-p keeps most of the vocabulary.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slipstream.kernels.sampling import Filters, SlotTable, apply_filters, greedy, sample
from slipstream.kernels.triton import sampling as kernels
from slipstream.schema.sampling import SamplingParams

DEVICE = torch.device("cuda")
CALLS = 20
DTYPES = {"top_k": torch.int64}
WISHES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "typical 0.9": {"typical_p": 0.9},
    "0.7, 50, 0.9": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
}


def logits_of(kind: str, rows: int, vocab: int) -> Tensor:
    logits_RV = torch.randn(rows, vocab, device=DEVICE)
    if kind == "like a model":
        logits_RV = 2.5 * logits_RV
        logits_RV[:, torch.randperm(vocab, device=DEVICE)[:40]] += torch.linspace(6, 14, 40, device=DEVICE)
    return logits_RV.bfloat16()


def setup(wish: dict[str, Any], logits_RV: Tensor) -> tuple[SlotTable, Tensor, Tensor]:
    rows = len(logits_RV)
    table = SlotTable(rows, DEVICE)
    for slot in range(rows):
        table.write(slot, SamplingParams(**wish), 1234 + slot)
    return table, torch.arange(rows, device=DEVICE), torch.arange(rows, device=DEVICE) + 77


def check() -> None:
    for kind in ("like a model", "flat"):
        for name, wish in WISHES.items():
            logits_RV = logits_of(kind, 16, 128256)
            table, slots_R, positions_R = setup(wish, logits_RV)
            on_cpu = SlotTable(16, torch.device("cpu"))
            on_cpu.numbers.copy_(table.numbers)
            found_R = table.choose(logits_RV, slots_R, positions_R).cpu()
            right_R = on_cpu.choose(logits_RV.cpu(), slots_R.cpu(), positions_R.cpu())
            num_wrong = int((found_R != right_R).sum())
            print(f"check {kind}, {name}: {16 - num_wrong} of 16 tokens are the CPU's", flush=True)


def replayed_us(call: Callable[[], Any]) -> float:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return event_us(graph.replay) / CALLS


def event_us(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times[2:])


def num_launches(call: Callable[[], Any]) -> int:
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(each.count for each in profiler.key_averages() if each.self_device_time_total)


def by_torch(wish: dict[str, Any], logits_RV: Tensor, positions_R: Tensor) -> Tensor:
    asked = SamplingParams(**wish)
    if asked.is_greedy:
        return greedy(logits_RV)
    rows = len(logits_RV)
    names = ("temperature", "top_k", "typical_p", "top_p", "min_p")
    columns = (torch.full((rows,), getattr(asked, name), dtype=DTYPES.get(name, torch.float64)) for name in names)
    return sample(apply_filters(logits_RV.float(), Filters(*columns)), torch.arange(rows), positions_R)


def measure(kind: str, rows: int, vocab: int, name: str) -> str:
    logits_RV = logits_of(kind, rows, vocab)
    table, slots_R, positions_R = setup(WISHES[name], logits_RV)

    def ours() -> Tensor:
        return kernels.choose(logits_RV, slots_R, positions_R, table.numbers, table.last_token)

    def torchs() -> Tensor:
        return by_torch(WISHES[name], logits_RV, positions_R)

    us, us_of_torch = replayed_us(ours), event_us(torchs)
    launches = f"{num_launches(ours)} | {num_launches(torchs)}" if rows == 1 and vocab == 128256 else " | "
    return f"{us:.1f} | {us_of_torch:.1f} | {launches}"


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    check()
    print("| logits | rows | vocabulary | wish | µs | torch µs | launches | torch's |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind in ("like a model", "flat"):
        for vocab in (32000, 128256):
            for rows in (1, 64, 256):
                for name in WISHES:
                    try:
                        found = measure(kind, rows, vocab, name)
                    except Exception as error:  # the others are measured all the same
                        found = f"{type(error).__name__}: {error}"
                    print(f"| {kind} | {rows} | {vocab} | {name} | {found} |", flush=True)
    tokens_T = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    last_token_S = torch.zeros(9, dtype=torch.int64, device=DEVICE)
    print(f"fill_pending: {replayed_us(lambda: kernels.fill_pending(tokens_T, tokens_T, last_token_S)):.1f} µs")


if __name__ == "__main__":
    main()
