"""Acceptance against the walk down a tree by hand, and against the distribution that the target alone has."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slipstream.kernels.sampling import NOTHING_TO_SAMPLE, sample
from slipstream.speculative.accept import Accepted, accept
from slipstream.speculative.tree import WORD, ancestors, chain_parents, check_parents, depths

P_VALUE = 1e-6


@st.composite
def parents_of(draw: st.DrawFn, most: int = 80) -> list[int]:
    """Of the drafts of a tree."""
    num_drafts = draw(st.integers(0, most))
    shape = draw(st.sampled_from(("any", "deep", "wide")))
    lowest = {"any": lambda d: 0, "deep": lambda d: max(0, d - 2), "wide": lambda d: 0}[shape]
    highest = {"any": lambda d: d - 1, "deep": lambda d: d - 1, "wide": lambda d: min(2, d - 1)}[shape]
    return [draw(st.integers(lowest(d), highest(d))) for d in range(1, num_drafts + 1)]


def way_up(parents: list[int], node: int) -> list[int]:
    """A node and all above it; parents[0] is that of node 1."""
    return [node] if node == 0 else [node, *way_up(parents, parents[node - 1])]


# ---- trees ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(parents_of(), min_size=1, max_size=3))
def test_packed_ancestors_and_depths_are_those_of_the_way_up(trees: list[list[int]]) -> None:
    num_nodes = 1 + max(map(len, trees))
    parents_SM = torch.tensor([[0, *parents, *[0] * (num_nodes - 1 - len(parents))] for parents in trees])
    masks_SMW, depths_SM = ancestors(parents_SM), depths(parents_SM)
    assert masks_SMW.shape == (len(trees), num_nodes, -(-num_nodes // WORD))
    for tree, parents in enumerate(trees):
        for node in range(1 + len(parents)):
            way = way_up(parents, node)
            seen = {n for n in range(num_nodes) if int(masks_SMW[tree, node, n // WORD]) >> n % WORD & 1}
            assert seen == set(way)
            assert depths_SM[tree, node] == len(way) - 1


def test_parents_come_before_their_children() -> None:
    check_parents([])
    check_parents([0, 1, 0, 3])
    for parents in ([1], [0, 2], [0, -1]):
        with pytest.raises(ValueError, match="before its children"):
            check_parents(parents)


# ---- the walk -------------------------------------------------------------------------------------------------------


def walk(chosen: list[int], drafted: list[int], parents: list[int], node: int = 0) -> list[int]:
    """The longest way down from a node along what was chosen."""
    children = [child for child in range(1, len(chosen)) if parents[child - 1] == node]
    said = [child for child in children if drafted[child] == chosen[node] and chosen[child] != NOTHING_TO_SAMPLE]
    return [node, *max((walk(chosen, drafted, parents, child) for child in said), key=len, default=[])]


@settings(max_examples=150, deadline=None)
@given(st.lists(parents_of(12), min_size=1, max_size=5), st.data())
def test_the_walk_is_the_one_by_hand(trees: list[list[int]], data: st.DataObject) -> None:
    num_nodes = 1 + max(map(len, trees)) + data.draw(st.integers(0, 2))
    chosen, drafted = [], []
    for parents in trees:
        # Siblings of one token have one future: what is chosen depends on the text alone.
        tokens = [-7, *(data.draw(st.integers(0, 2)) for _ in parents)]
        texts = [tuple(tokens[node] for node in reversed(way_up(parents, node))) for node in range(len(tokens))]
        after = {text: data.draw(st.integers(NOTHING_TO_SAMPLE, 2)) for text in sorted(set(texts))}
        junk = [data.draw(st.integers(0, 2)) for _ in range(num_nodes - len(tokens))]
        chosen.append([*(after[text] for text in texts), *junk])
        drafted.append([*tokens, *junk])
    parents_SM = torch.tensor([[0, *parents, *[0] * (num_nodes - 1 - len(parents))] for parents in trees])
    num_nodes_S = torch.tensor([1 + len(parents) for parents in trees])
    found = accept(torch.tensor(chosen), torch.tensor(drafted), parents_SM, num_nodes_S)
    for tree, parents in enumerate(trees):
        size = 1 + len(parents)
        expected = walk(chosen[tree][:size], drafted[tree][:size], parents)
        count = int(found.counts[tree])
        nodes = found.path[tree, :count].tolist()
        assert found.token_ids[tree, :count].tolist() == [chosen[tree][node] for node in expected]
        assert all(parents[child - 1] == parent for parent, child in pairwise(nodes))
        # Of siblings with one token either may be it: what they say, and what follows, is the same.
        assert [drafted[tree][node] for node in nodes[1:]] == [drafted[tree][node] for node in expected[1:]]


def test_a_batch_without_drafts_gains_one_token_each() -> None:
    chosen_S1 = torch.tensor([[4], [5]])
    found = accept(chosen_S1, chosen_S1, torch.zeros_like(chosen_S1), torch.ones(2, dtype=torch.int64))
    assert (found.counts.tolist(), found.token_ids.tolist(), found.path.tolist()) == (
        [1, 1],
        [[4], [5]],
        [[0], [0]],
    )


# ---- the distribution -----------------------------------------------------------------------------------------------

VOCAB, NUM_DRAWS, START = 6, 20_000, 5


def language(seed: int, sharpness: float = 1.5) -> Tensor:
    """Logits of the token after each token."""
    return sharpness * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


def decode(logits_VV: Tensor, seeds_S: Tensor, num_tokens: int) -> Tensor:
    """Plainly, one token a step, after token 0. -> [S, num_tokens]"""
    columns = [torch.zeros_like(seeds_S)]
    for place in range(num_tokens):
        columns.append(sample(logits_VV[columns[-1]], seeds_S, torch.full_like(seeds_S, START + place)))
    return torch.stack(columns[1:], dim=1)


def verify(logits_VV: Tensor, seeds_S: Tensor, drafts_SN: Tensor, parents: list[int]) -> Accepted:
    """One step over these drafts."""
    num_sequences, num_nodes = len(seeds_S), 1 + len(parents)
    drafted_SM = torch.cat((torch.zeros(num_sequences, 1, dtype=torch.int64), drafts_SN), dim=1)
    parents_SM = torch.tensor([0, *parents]).expand(num_sequences, -1)
    positions_SM = START + depths(parents_SM)
    chosen_R = sample(logits_VV[drafted_SM.flatten()], seeds_S.repeat_interleave(num_nodes), positions_SM.flatten())
    return accept(chosen_R.view(num_sequences, -1), drafted_SM, parents_SM, torch.full((num_sequences,), num_nodes))


def two_tokens(logits_VV: Tensor, seeds_S: Tensor, found: Accepted) -> Tensor:
    """The text's next two tokens; the second may need a step of its own."""
    first_S = found.token_ids[:, 0]
    plain_S = sample(logits_VV[first_S], seeds_S, torch.full_like(seeds_S, START + 1))
    return torch.stack((first_S, found.token_ids[:, 1].where(found.counts > 1, plain_S)), dim=1)


def assert_from_the_target(logits_VV: Tensor, tokens_S2: Tensor) -> None:
    probs_VV = logits_VV.double().softmax(1)
    expected_VV = (probs_VV[0, :, None] * probs_VV).flatten().numpy() * len(tokens_S2)
    counts_VV = np.bincount((tokens_S2[:, 0] * VOCAB + tokens_S2[:, 1]).numpy(), minlength=VOCAB * VOCAB)
    rare = expected_VV < 5
    counts, expected = (
        np.append(counts_VV[~rare], counts_VV[rare].sum()),
        np.append(expected_VV[~rare], expected_VV[rare].sum()),
    )
    assert scipy.stats.chisquare(counts + 1e-9, expected + 1e-9).pvalue > P_VALUE


def drafts_of(kind: str, logits_VV: Tensor, seeds_S: Tensor) -> tuple[Tensor, list[int]]:
    """A chain drawn from another language with the target's noise, one from its own, a given chain, or a tree."""
    likely = logits_VV.argsort(1, descending=True)
    match kind:
        case "drawn from the target itself":
            return decode(logits_VV, seeds_S, 3), chain_parents(3)
        case "drawn from a like model":
            return decode(logits_VV + 0.5 * language(7), seeds_S, 3), chain_parents(3)
        case "drawn from a strange model":
            return decode(language(8), seeds_S, 3), chain_parents(3)
        case "drawn without the target's noise":
            return decode(logits_VV, seeds_S + 10**6, 3), chain_parents(3)
        case "given, likely":
            first = int(likely[0, 0])
            return torch.tensor([[first, int(likely[first, 0])]]).expand(len(seeds_S), -1), chain_parents(2)
        case "given, unlikely":
            first = int(likely[0, -1])
            return torch.tensor([[first, int(likely[first, -1])]]).expand(len(seeds_S), -1), chain_parents(2)
        case "a tree":
            one, two, three = likely[0, :3].tolist()
            tokens = [two, one, int(likely[one, 1]), three, int(likely[one, 0]), int(likely[two, 2])]
            return torch.tensor([tokens]).expand(len(seeds_S), -1), [0, 0, 2, 0, 2, 1]
    raise AssertionError(kind)


KINDS = (
    "drawn from the target itself", "drawn from a like model", "drawn from a strange model",
    "drawn without the target's noise", "given, likely", "given, unlikely", "a tree",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_two_tokens_are_drawn_from_the_target_whatever_the_drafts(kind: str) -> None:
    logits_VV, seeds_S = language(1), torch.arange(NUM_DRAWS)
    found = verify(logits_VV, seeds_S, *drafts_of(kind, logits_VV, seeds_S))
    tokens_S2 = two_tokens(logits_VV, seeds_S, found)
    assert_from_the_target(logits_VV, tokens_S2)
    assert torch.equal(tokens_S2, decode(logits_VV, seeds_S, 2))  # and more: they are those of plain decoding


def test_the_chi_square_would_notice() -> None:
    """What is drafted, taken as it is."""
    logits_VV, seeds_S = language(1), torch.arange(NUM_DRAWS)
    drafts_SN, _ = drafts_of("drawn from a like model", logits_VV, seeds_S)
    with pytest.raises(AssertionError):
        assert_from_the_target(logits_VV, drafts_SN[:, :2])


def test_siblings_are_accepted_as_often_as_by_the_sibling_rule() -> None:
    """x with p(x), then y with p(y) / (1 - p(x)), ...: in all with p(x) + p(y) + ..."""
    logits_VV, seeds_S = language(1), torch.arange(NUM_DRAWS)
    siblings = [3, 0, 5]
    found = verify(logits_VV, seeds_S, torch.tensor([siblings]).expand(NUM_DRAWS, -1), [0, 0, 0])
    probability = float(logits_VV[0].double().softmax(0)[siblings].sum())
    accepted = int((found.counts > 1).sum())
    assert scipy.stats.binomtest(accepted, NUM_DRAWS, probability).pvalue > P_VALUE


@pytest.mark.parametrize("difference", [0.1, 0.5, 2.0])
def test_drafts_with_the_targets_noise_are_accepted_as_often_as_the_coupling_promises(difference: float) -> None:
    logits_VV, seeds_S = language(1), torch.arange(NUM_DRAWS)
    other_VV = logits_VV + difference * language(9)
    found = verify(logits_VV, seeds_S, decode(other_VV, seeds_S, 1), [0])
    distance = float((logits_VV[0].softmax(0) - other_VV[0].softmax(0)).abs().sum()) / 2
    rate = float((found.counts > 1).double().mean())
    noise = 4 * (0.25 / NUM_DRAWS) ** 0.5
    assert (1 - distance) / (1 + distance) - noise <= rate <= 1 - distance + noise
