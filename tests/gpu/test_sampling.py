"""Sampling on the GPU: the reference's tokens for the same seeds, filters in float64, rows that disturb no other."""

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from slipstream.kernels.sampling import NOTHING_TO_SAMPLE, Filters, SlotTable, apply_filters, uniform
from slipstream.runtime.worker.inputs import NO_SLOT
from slipstream.runtime.worker.sample import Sampler
from slipstream.schema.request import GenerateRequest
from slipstream.schema.sampling import SamplingParams
from slipstream.schema.step import PENDING

kernels = pytest.importorskip("slipstream.kernels.triton.sampling")

P_VALUE = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["random", "ties", "banned", "flat"]
# What a row may ask for. The borders of each filter are also met together with those before it.
WISHES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6},
    {"top_k": 1, "temperature": 2.0},
    *[{"top_k": top_k} for top_k in (2, 50, 700, 10**9)],
    *[{"top_p": top_p} for top_p in (1e-9, 0.1, 0.9, 0.999999)],
    *[{"min_p": min_p} for min_p in (1e-6, 0.05, 1.0)],
    *[{"typical_p": typical_p} for typical_p in (1e-6, 0.3, 0.95)],
    {"top_k": 50, "top_p": 0.9, "temperature": 0.7},
    {"top_k": 40, "typical_p": 0.9, "top_p": 0.8, "min_p": 0.02, "temperature": 1.7},
]


def table_of(wishes: list[dict[str, Any]], device: torch.device, first_seed: int = 0) -> SlotTable:
    table = SlotTable(len(wishes), device)
    for slot, wish in enumerate(wishes):
        table.write(slot, SamplingParams(**wish), first_seed + slot)
    return table


def choose(logits_RV: Tensor, slots: list[int], positions: list[int], table: SlotTable) -> Tensor:
    slots_R, positions_R = torch.tensor([slots, positions], dtype=torch.int64, device=logits_RV.device)
    return kernels.choose(logits_RV, slots_R, positions_R, table.numbers, table.last_token).cpu()


def numbers(kind: str, rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    logits_RV = 3 * torch.randn(rows, vocab)
    if kind == "ties":
        logits_RV = (logits_RV / 2).round()
    if kind == "banned":
        logits_RV[:, torch.rand(vocab) < 0.95] = -torch.inf
    if kind == "flat":
        logits_RV = torch.zeros(rows, vocab)
    return logits_RV.to(dtype)


def filtered(logits_RV: Tensor, wishes: list[dict[str, Any]]) -> Tensor:
    """By the reference, in float64."""
    asked = [SamplingParams(**wish) for wish in wishes]
    columns = {
        name: torch.tensor([getattr(each, name) for each in asked], dtype=torch.float64)
        for name in ("temperature", "typical_p", "top_p", "min_p")
    }
    return apply_filters(logits_RV.double(), Filters(top_k=torch.tensor([each.top_k for each in asked]), **columns))


@pytest.mark.parametrize(("vocab", "dtype"), [(300, torch.float16), (300, torch.float32), (9_001, torch.bfloat16)])
def test_tokens_are_those_of_the_reference(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    """Rows of all kinds in one call, from rows that lie apart, with slots and positions of any order."""
    logits_RV = numbers("random", len(WISHES), vocab + 24, dtype)[:, :vocab]
    slots = torch.randperm(len(WISHES)).tolist()
    positions = [int(2**exponent) + 3 for exponent in torch.linspace(0, 40, len(WISHES)).tolist()]
    here, there = (table_of(WISHES, each, first_seed=2**62 + 12345) for each in (torch.device("cpu"), device))
    expected = here.choose(logits_RV, torch.tensor(slots), torch.tensor(positions))
    assert choose(logits_RV.to(device), slots, positions, there).tolist() == expected.tolist()
    assert there.last_token.tolist() == here.last_token.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_filters_keep_what_they_keep_in_float64(kind: str, device: torch.device) -> None:
    """Of each row the least likely token that is kept and the likeliest that is not (of those that tie, the ones at the
    border), each at a position whose noise makes it win if it can."""
    vocab, places = 203, 20_000
    wishes = [wish for wish in WISHES if not SamplingParams(**wish).is_greedy]
    if device.type == "cpu":  # the interpreter takes 0.2 s a row
        wishes = wishes[KINDS.index(kind) :: 3]
    table, slots, positions, expected = table_of(wishes, device), [], [], []
    logits_RV = numbers(kind, len(wishes), vocab, torch.bfloat16)
    kept_RV = filtered(logits_RV, wishes)
    for row, wish in enumerate(wishes):
        scaled_V = logits_RV[row].double() / wish.get("temperature", 1.0)
        is_kept_V = kept_RV[row].isfinite()
        tokens = [scaled_V.masked_fill(~is_kept_V, torch.inf).flip(0).argmin()]
        tokens[0] = vocab - 1 - tokens[0]
        if not is_kept_V.all():
            tokens.append(scaled_V.masked_fill(is_kept_V, -torch.inf).argmax())
        noise_TV = -torch.log(-torch.log(uniform(torch.full((places,), row), torch.arange(places), quads(vocab))))
        score_TV = scaled_V + noise_TV.flatten(1)[:, :vocab]
        for token in tokens:
            others_T = score_TV.clone().index_fill_(1, token, -torch.inf).amax(1)
            position = int((score_TV[:, token] - others_T).argmax())
            slots.append(row)
            positions.append(position)
            expected.append(int(score_TV[position].masked_fill(~is_kept_V, -torch.inf).argmax()))
    found = choose(logits_RV.to(device)[slots], slots, positions, table).tolist()
    for slot, position, token_id, right in zip(slots, positions, found, expected, strict=True):
        assert token_id == right, (wishes[slot], position)


def quads(vocab: int) -> Tensor:
    return torch.arange(-(-vocab // 4))[None]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="thousands of rows take the interpreter an hour")
def test_draws_follow_the_distribution(device: torch.device) -> None:
    vocab, draws = 7, 20_000
    wishes: list[dict[str, Any]] = [{}, {"temperature": 1.5, "top_k": 5}, {"top_p": 0.8}]
    logits_RV = torch.randn(len(wishes), vocab)
    probs_RV = filtered(logits_RV, wishes).softmax(1)
    slots = [slot for slot in range(len(wishes)) for _ in range(draws)]
    found = choose(logits_RV.to(device)[slots], slots, list(range(len(slots))), table_of(wishes, device))
    for drawn, probs_V in zip(found.view(-1, draws), probs_RV, strict=True):
        counts = np.bincount(drawn, minlength=vocab)
        possible = probs_V.numpy() > 0
        assert counts[~possible].sum() == 0
        expected = probs_V.numpy()[possible] * draws
        assert scipy.stats.chisquare(counts[possible], expected).pvalue > P_VALUE


def test_greedy_takes_the_lowest_id_of_a_tie_from_any_part(device: torch.device) -> None:
    table = SlotTable(1, device)
    for ids in itertools.combinations((0, 5, 63, 64, 1023, 1024, 4095, 9000), 2):
        logits_RV = torch.full((1, 9001), -0.0)
        logits_RV[0, list(ids)] = 1e-30
        assert choose(logits_RV.to(device), [NO_SLOT], [0], table).tolist() == [ids[0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_distribution_are_named_and_harm_no_other(dtype: torch.dtype, device: torch.device) -> None:
    wishes: list[dict[str, Any]] = [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.5, "typical_p": 0.4}]
    broken = (torch.nan, torch.inf, -torch.inf)
    rows = [(slot, value) for slot in range(len(wishes)) for value in (*broken, 1.0)]
    logits_RV = torch.randn(len(rows), 500)
    for row, (_, value) in enumerate(rows):
        logits_RV[row] = value if value == -torch.inf else logits_RV[row].index_fill(0, torch.tensor(321), value)
    table, slots, positions = table_of(wishes, device), [slot for slot, _ in rows], list(range(len(rows)))
    logits_RV = logits_RV.to(device, dtype)
    found = choose(logits_RV, slots, positions, table).tolist()
    for row, (slot, value) in enumerate(rows):
        if value == 1:
            alone = choose(logits_RV[[row]], [slot], [row], table).tolist()
            assert [found[row]] == alone and found[row] >= 0
        else:
            assert found[row] == NOTHING_TO_SAMPLE


def test_rows_without_a_slot_are_greedy_and_slots_keep_their_last_token(device: torch.device) -> None:
    """Rows that no slot owns (padding, prompt logprobs) leave the last tokens of slots alone."""
    table = table_of([{}] * 4, device)
    table.last_token.fill_(77)
    logits_RV = torch.randn(5, 300, device=device)
    found = choose(logits_RV, [NO_SLOT, 2, NO_SLOT, 0, NO_SLOT], [9] * 5, table)
    assert found[[0, 2, 4]].tolist() == logits_RV.argmax(1)[[0, 2, 4]].tolist()
    assert table.last_token[:4].tolist() == [found[3], 77, found[1], 77]


def test_pending_tokens_are_those_that_slots_sampled_last(device: torch.device) -> None:
    table = SlotTable(3, device)
    table.last_token[:3] = torch.tensor([40, NOTHING_TO_SAMPLE, 60])
    token_ids, slots = [5, PENDING, PENDING, PENDING, 0, PENDING] * 60, [2, 2, 1, 0, 1, 2] * 60
    tokens_T, slots_T = (torch.tensor(each, device=device) for each in (token_ids, slots))
    kernels.fill_pending(tokens_T, slots_T, table.last_token)
    assert tokens_T.tolist() == [5, 60, 0, 40, 0, 60] * 60
    again_T = torch.tensor(token_ids, device=device)
    table.fill_pending(again_T, slots_T)
    assert again_T.tolist() == tokens_T.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU runs while the host goes on")
def test_drawing_waits_for_nothing(device: torch.device) -> None:
    """Rows with every kind of edit beside rows without, new ones too."""
    vocab, prompt = 500, (1, 2, 3)
    edits: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3, "top_p": 0.9}, {"logit_bias": {4: 2.0}, "temperature": 0}, {"min_p": 0.1},
        {"no_repeat_ngram_size": 2, "frequency_penalty": 0.5}, {"typical_p": 0.9, "presence_penalty": 1.0},
    ]  # fmt: skip
    sampler, logits_RV = Sampler(vocab, len(edits), device), torch.randn(len(edits), vocab, device=device).bfloat16()
    slots, positions, chosen_R = list(range(len(edits))), [5] * len(edits), logits_RV.argmax(1)
    found = []
    for is_checked in (False, True):  # the first time kernels are compiled
        torch.cuda.set_sync_debug_mode("error" if is_checked else "default")
        try:
            for slot, fields in enumerate(edits):
                request = GenerateRequest(str(slot), prompt, SamplingParams(**fields), seed=slot, max_tokens=9)
                sampler.add(slot, request, (7, 8))
            draw = sampler.draw(slots, positions, logits_RV, chosen_R)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append([result.token_ids for result in sampler.finish(draw)])
    assert found[0] == found[1] and () not in found[0]


def test_no_rows(device: torch.device) -> None:
    assert choose(torch.empty(0, 100, device=device), [], [], SlotTable(1, device)).tolist() == []
