"""Trees of drafts by kernels: tables of slots, tokens, what is accepted and what moves are as torch has them."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from slipstream.checkpoint.random import write_random_model
from slipstream.kernels.sampling import NOTHING_TO_SAMPLE
from slipstream.models import gemma3_text
from slipstream.runtime.worker.drafts import Drafts
from slipstream.runtime.worker.ending import Ending
from slipstream.runtime.worker.groups import group_input
from slipstream.runtime.worker.inputs import NO_SLOT, draft_name
from slipstream.schema.kv import KVGroup
from slipstream.speculative.accept import Accepted
from slipstream.speculative.drafter import DraftTensors
from tests.runtime.test_late import check as check_late
from tests.speculative.heads import write_medusa
from tests.speculative.parrot import offered
from tests.speculative.test_accept import parents_of
from tests.speculative.test_lossless import BUSH, NGRAM, REQUESTS, assert_same, run

kernels = pytest.importorskip("slipstream.kernels.triton.trees")

NUM_SLOTS, VOCAB = 5, 7
PHASES = (Phase.explicit, Phase.generate)  # the interpreter is too slow to make a failure smaller
SLOTS = st.lists(st.integers(0, NUM_SLOTS - 1), min_size=1, max_size=3, unique=True)


def both(device: torch.device, max_len: int, can_branch: bool) -> tuple[Drafts, Drafts]:
    """By torch, and by kernels."""
    found = []
    for module in (None, kernels):
        last_token_X = torch.zeros(NUM_SLOTS + 1, dtype=torch.int64, device=device)
        drafts = Drafts(
            None, VOCAB, NUM_SLOTS, device, lambda slot: (), last_token_X, max_len=max_len, can_branch=can_branch
        )
        drafts.kernels, drafts._may_look = module, False
        found.append(drafts)
    return found[0], found[1]


def kept(data: st.DataObject, device: torch.device, max_len: int, can_branch: bool) -> tuple[list[int], list[Drafts]]:
    """Trees of the same slots in both, some of fewer drafts than there may be."""
    pair, slots = both(device, max_len, can_branch), data.draw(SLOTS)
    trees = [data.draw(parents_of(max_len)) for _ in slots]
    count = max(map(len, trees))
    parents_SN = torch.tensor([[*tree, *[0] * (count - len(tree))] for tree in trees], dtype=torch.int64)
    parents_SN = parents_SN.view(len(slots), count)
    token_ids_SN = torch.randint(-1, VOCAB + 1, (len(slots), count))  # some are outside
    if not can_branch:
        parents_SN = torch.arange(count).expand_as(token_ids_SN)
    for drafts in pair:
        tensors = DraftTensors(token_ids_SN.to(device), parents_SN.to(device))
        drafts.keep(torch.tensor(slots, device=device), tensors)
    return slots, list(pair)


@pytest.mark.parametrize("can_branch", [True, False])
@settings(max_examples=25, deadline=None, phases=PHASES)
@given(data=st.data())
def test_slots_hold_the_same(device: torch.device, can_branch: bool, data: st.DataObject) -> None:
    slots, (expected, found) = kept(data, device, data.draw(st.sampled_from((1, 6, 63, 64, 80))), can_branch)
    for name in ("_token_ids", "_parents", "_depths", "_masks"):
        if can_branch or name in ("_token_ids", "_parents"):
            assert torch.equal(getattr(found, name)[slots], getattr(expected, name)[slots]), name
    others = [slot for slot in range(NUM_SLOTS + 1) if slot not in slots]
    assert not found._token_ids[others].any() and not found._masks[others].any()


@pytest.mark.parametrize("can_branch", [True, False])
@settings(max_examples=25, deadline=None, phases=PHASES)
@given(data=st.data())
def test_names_become_drafts_at_their_places(device: torch.device, can_branch: bool, data: st.DataObject) -> None:
    max_len = data.draw(st.sampled_from((1, 9, 70)))
    slots, pair = kept(data, device, max_len, can_branch)
    names = data.draw(st.lists(st.integers(-1, max_len - 1), min_size=1, max_size=90))  # -1: a token that is known
    token_ids_T = torch.tensor([5 if name < 0 else draft_name(name) for name in names])
    rows_R = torch.tensor(data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=4)))
    slots_T = torch.tensor([slots[index % len(slots)] for index in range(len(names))])
    made = []
    for drafts in pair:
        inputs = {
            "step.token_ids": token_ids_T.clone(), "token_slots": slots_T, "step.positions": torch.arange(len(names)),
            "step.logit_rows": rows_R, "row_positions": 1 + rows_R,
        }  # fmt: skip
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        made.append({**inputs, **drafts.fill(inputs)})
    assert made[0].keys() == made[1].keys()
    for name, expected in made[0].items():
        assert torch.equal(made[1][name], expected), name


@pytest.mark.parametrize("can_branch", [True, False])
@settings(max_examples=50, deadline=None, phases=PHASES)
@given(data=st.data())
def test_the_same_drafts_are_accepted(device: torch.device, can_branch: bool, data: st.DataObject) -> None:
    max_len = data.draw(st.sampled_from((1, 6, 66)))
    slots, pair = kept(data, device, max_len, can_branch)
    slots.append(NO_SLOT)
    num_nodes = data.draw(st.sampled_from((1, 1 + max_len)))
    sizes = torch.tensor([*(data.draw(st.integers(1, num_nodes)) for _ in slots[1:]), 0])
    rows = sizes.cumsum(0) - sizes
    # Mostly what was drafted, so that ways are long; NOTHING_TO_SAMPLE among it.
    chosen_R = torch.randint(-1, 2, (int(sizes.sum()),)) + data.draw(st.integers(0, VOCAB - 2))
    if data.draw(st.booleans()):
        for drafts in pair:
            drafts._token_ids.fill_(3)
        chosen_R = torch.full_like(chosen_R, 3)
        chosen_R[torch.rand(len(chosen_R)) < 0.2] = NOTHING_TO_SAMPLE
    given_to = [torch.tensor(slots), rows, sizes]
    expected, found = (
        drafts.accepted(*(each.to(device) for each in given_to), num_nodes, chosen_R.to(device)) for drafts in pair
    )
    for name, theirs, ours in zip(Accepted._fields, expected, found, strict=True):
        assert torch.equal(ours, theirs), name
    for name in ("num_accepted_X", "_last_token_X"):  # where late steps begin
        theirs, ours = (getattr(drafts, name)[slots[:-1]] for drafts in pair)
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_what_is_accepted_moves(device: torch.device, dtype: torch.dtype) -> None:
    """Of three trees in blocks anywhere, one of them a chain, of layers some of which are wider than the others."""
    block_size, layers = 4, 3
    dtypes = [dtype, torch.float32, dtype]
    kv = [torch.randint(-9, 9, (2, 12, block_size, 2, 5)).to(each) for each in dtypes]
    path_SM = torch.tensor([[0, 2, 3, 6, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0], [0, 4, 0, 0, 0, 0, 0]])
    accepted = Accepted(torch.tensor([4, 3, 2]), path_SM, path_SM, path_SM)
    inputs = {
        "step.tree_starts": torch.tensor([2, 5, 7]), "trees.sizes": torch.tensor([7, 3, 5]),
        "step.block_tables": torch.tensor([[3, 9, 1], [4, 2, 5], [7, 6, 8]]),
    }  # fmt: skip
    made = []
    for module in (None, kernels):
        drafts = SimpleNamespace(kernels=module, can_branch=True, _may_look=False)
        ranks = SimpleNamespace(copy_first=lambda tensor: None)
        groups = [KVGroup(tuple(range(layers)), 0)]
        ending = Ending(drafts, None, groups, block_size, device, ranks, None)  # type: ignore[arg-type]
        own = [each.clone().to(device) for each in kv]
        given_to = Accepted(*(each.to(device) for each in accepted))
        ending._compact({name: each.to(device) for name, each in inputs.items()}, given_to, own)
        made.append(own)
    for ours, theirs, before in zip(made[1], made[0], kv, strict=True):
        assert torch.equal(ours, theirs) and not torch.equal(ours.cpu(), before)


@pytest.mark.parametrize("method", ["bush", "ngram", "medusa"])
def test_texts_are_those_without_drafts(
    device: torch.device, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it together: trees and chains, from the host and from the device, with windows and edits in one batch."""
    model = write_random_model(tmp_path / "model", gemma3_text.TINY)
    speculative: dict[str, Any] = {"bush": BUSH, "ngram": NGRAM}.get(method, {"method": method, "adaptive": False})
    if method == "medusa":
        speculative |= {"model": str(write_medusa(model, tmp_path / "heads")), "max_draft_len": 6}
    requests, options = [{**each, "max_tokens": 16} for each in REQUESTS[:8]], {"device": str(device)}
    expected, _ = run(model, requests, **options)
    monkeypatch.setattr("slipstream.runtime.worker.drafts.tree_kernels", lambda device: kernels)
    with offered(tmp_path, monkeypatch, bush="tests.speculative.parrot:Bush"):
        found, stats = run(model, requests, speculative=speculative, **options)
    assert_same(found, expected)
    assert sum(stats.num_accepted_tokens) > 0 or method == "medusa"


@pytest.mark.parametrize("seed", range(6))
def test_late_steps_are_moved_on(seed: int, device: torch.device) -> None:
    def move(inputs: Mapping[str, torch.Tensor], accepted_X: torch.Tensor, num_groups: int, size: int) -> None:
        for group in range(num_groups):
            of_group = (inputs[group_input(name, group)] for name in ("step.slots", "step.block_tables"))
            kernels.move_on(inputs, accepted_X, *of_group, size, is_first=group == 0)
        inputs["row_positions"].copy_(1 + inputs["step.positions"][inputs["step.logit_rows"]])

    check_late(seed, 1 + seed % 3, move, device)
