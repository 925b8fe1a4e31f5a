"""kernels/sampling.py: the filters against transformers' warpers, Philox against its published vectors, the draws."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from slipstream.kernels.sampling import (
    NOTHING_TO_SAMPLE,
    Filters,
    apply_filters,
    apply_temperature,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    filter_typical_p,
    gather_logprobs,
    greedy,
    philox,
    sample,
    uniform,
)

P_VALUE = 1e-6

# By filter: our function, transformers' warper, the value that switches it off, values to try.
FILTERS = {
    "temperature": (apply_temperature, TemperatureLogitsWarper, 1.0, (0.1, 0.7, 1.5, 100.0)),
    "top_k": (filter_top_k, TopKLogitsWarper, 0, (1, 2, 7, 50, 99, 100, 5000)),
    "typical_p": (filter_typical_p, TypicalLogitsWarper, 1.0, (1e-6, 0.1, 0.5, 0.9, 0.999999)),
    "top_p": (filter_top_p, TopPLogitsWarper, 1.0, (1e-6, 0.1, 0.5, 0.9, 0.999999)),
    "min_p": (filter_min_p, MinPLogitsWarper, 0.0, (1e-6, 0.05, 0.5, 1.0)),
}


def logits_of(kind: str, rows: int, vocab: int = 100) -> Tensor:
    logits_RV = 4 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(7))
    if kind == "ties":
        return (logits_RV / 2).round()
    if kind == "banned":
        return logits_RV.masked_fill(logits_RV < 1, -torch.inf)
    if kind == "flat":
        return torch.zeros_like(logits_RV)
    return logits_RV


@pytest.mark.parametrize("kind", ["random", "ties", "banned", "flat"])
@pytest.mark.parametrize("name", FILTERS)
def test_filter_equals_the_transformers_warper_in_a_mixed_batch(name: str, kind: str) -> None:
    ours, warper, off, values = FILTERS[name]
    parameters = [off, *values, off, *reversed(values)]
    logits_RV = logits_of(kind, len(parameters))
    before_RV = logits_RV.clone()
    dtype = torch.int64 if isinstance(off, int) else torch.float64
    filtered_RV = ours(logits_RV, torch.tensor(parameters, dtype=dtype))
    for row, parameter in enumerate(parameters):
        expected_1V = logits_RV[[row]]
        if parameter != off:
            expected_1V = warper(parameter)(None, expected_1V.clone())
        kept_1V = filtered_RV[[row]]
        if name == "top_p":  # which of the tokens that tie at the border stay, transformers leaves to an unstable sort
            kept_1V, expected_1V = kept_1V.sort().values, expected_1V.sort().values
        assert torch.equal(kept_1V, expected_1V), f"{name}={parameter}"
    assert torch.equal(logits_RV, before_RV)


@pytest.mark.parametrize("name", FILTERS)
def test_filter_that_every_row_needs(name: str) -> None:
    ours, warper, off, values = FILTERS[name]
    logits_RV = logits_of("random", len(values))
    filtered_RV = ours(logits_RV, torch.tensor(values, dtype=torch.int64 if isinstance(off, int) else torch.float64))
    expected_RV = torch.cat([warper(value)(None, logits_RV[[row]]) for row, value in enumerate(values)])
    assert torch.equal(filtered_RV, expected_RV)


@pytest.mark.parametrize("name", FILTERS)
def test_filter_that_no_row_needs_returns_its_input(name: str) -> None:
    ours, _, off, _ = FILTERS[name]
    logits_RV = logits_of("random", 3)
    assert ours(logits_RV, torch.tensor([off] * 3)) is logits_RV


def test_top_p_keeps_the_lower_ids_of_a_tie() -> None:
    kept = filter_top_p(torch.zeros(2, 1000), torch.tensor([1e-9, 0.2501], dtype=torch.float64)).isfinite()
    assert kept[0].nonzero().tolist() == [[0]]
    assert kept[1].nonzero()[:, 0].tolist() == list(range(251))


def test_top_k_alone_never_sorts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "sort", lambda *_, **__: pytest.fail("sorted the vocabulary"))
    filters = Filters(
        temperature=torch.tensor([0.5, 2.0], dtype=torch.float64),
        top_k=torch.tensor([5, 0]),
        typical_p=torch.ones(2, dtype=torch.float64),
        top_p=torch.ones(2, dtype=torch.float64),
        min_p=torch.tensor([0.1, 0.0], dtype=torch.float64),
    )
    apply_filters(logits_of("random", 2), filters)


def test_filters_run_in_the_promised_order() -> None:
    logits_RV = logits_of("random", 1)
    one = torch.ones(1, dtype=torch.float64)
    filters = Filters(
        temperature=2 * one, top_k=torch.tensor([40]), typical_p=0.9 * one, top_p=0.8 * one, min_p=0.05 * one
    )
    expected_RV = logits_RV
    for warper in (
        TemperatureLogitsWarper(2.0),
        TopKLogitsWarper(40),
        TypicalLogitsWarper(0.9),
        TopPLogitsWarper(0.8),
        MinPLogitsWarper(0.05),
    ):
        expected_RV = warper(None, expected_RV)
    assert torch.equal(apply_filters(logits_RV, filters), expected_RV)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123, philox4x32 10
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> Tensor:
        return torch.tensor([[int(word, 16)] for word in text.split()])

    assert philox(words(counter), words(key)).tolist() == words(expected).tolist()


def test_uniform_is_the_words_of_seed_position_and_token_ids() -> None:
    seed, position, quad = 2**63 - 1, 2**40 + 3, 12
    counter = torch.tensor([[quad], [0], [position & 0xFFFFFFFF], [position >> 32]])
    key = torch.tensor([[seed & 0xFFFFFFFF], [seed >> 32]])
    expected = [(word + 0.5) / 2**32 for word in philox(counter, key)[:, 0].tolist()]
    quads_1G = torch.arange(20)[None]
    assert uniform(torch.tensor([seed]), torch.tensor([position]), quads_1G)[0, quad].tolist() == expected


def test_uniform_is_uniform_and_independent_between_positions_seeds_and_tokens() -> None:
    seeds_R, positions_R, quad = torch.arange(50_000), torch.full((50_000,), 9), torch.tensor([[3]])
    here, next_position = (uniform(seeds_R, positions_R + step, quad)[:, 0, 1].numpy() for step in (0, 1))
    along = uniform(torch.full((50_000,), 1234), torch.arange(50_000), quad)[:, 0, 1].numpy()
    over = uniform(torch.tensor([77]), torch.tensor([5]), torch.arange(12_500)[None]).flatten().numpy()
    for values in (here, along, over):
        assert values.min() > 0 and values.max() < 1
        assert scipy.stats.kstest(values, "uniform").pvalue > P_VALUE
    pairs = [(here, next_position), *((values[:-1], values[1:]) for values in (here, along, over))]
    for first, second in pairs:
        cells = np.histogram2d(first, second, bins=16, range=((0, 1), (0, 1)))[0]
        assert scipy.stats.chisquare(cells.ravel()).pvalue > P_VALUE


def draw(logits_RV: Tensor, first_seed: int = 0) -> Tensor:
    seeds_R = torch.arange(first_seed, first_seed + len(logits_RV))
    return sample(logits_RV, seeds_R, torch.full_like(seeds_R, 4))


@pytest.mark.parametrize("num_kept", [1, 3, 40, 400])
def test_the_few_that_filters_leave_are_drawn_as_among_all(num_kept: int) -> None:
    """Noise belongs to a token id: only the candidates' is needed, and it is the same."""
    logits_RV = logits_of("random", 300, vocab=1000)
    kept_RV = filter_top_k(logits_RV, torch.full((300,), num_kept))
    quads_1G = torch.arange(250)[None]
    u_RV = uniform(torch.arange(300), torch.full((300,), 4), quads_1G).flatten(1)
    assert torch.equal(draw(kept_RV), (kept_RV - (-u_RV.log()).log().float()).argmax(dim=1))


def test_an_impossible_token_is_never_drawn_in_a_large_vocabulary() -> None:
    logits_RV = 3 * torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0))
    logits_RV[:, :100] = logits_RV[:, -100:] = -torch.inf
    logits_RV[3] = -torch.inf
    logits_RV[3, 31_415] = 0
    token_ids_R = draw(logits_RV)
    assert logits_RV.gather(1, token_ids_R[:, None]).isfinite().all()
    assert token_ids_R[3] == 31_415


def test_rounding_rarely_changes_a_draw() -> None:
    """Other batch sizes and kernels move logits by about 1e-5; among 20,000 draws that decides none or next to none."""
    logits_RV = logits_of("random", 20_000, vocab=200)
    noise_RV = 1e-5 * torch.randn(logits_RV.shape, generator=torch.Generator().manual_seed(1))
    assert (draw(logits_RV) != draw(logits_RV + noise_RV)).sum() <= 3


GREEDY = [
    pytest.param(kernel.function, id=name)
    for name, kernel in greedy.candidates(torch.device("cpu"), torch.float32).items()
]


@pytest.mark.parametrize("most_likely", GREEDY)
@pytest.mark.parametrize("vocab_size", [5, 16, 35])
def test_rows_without_a_distribution_are_named_and_harm_no_other(
    most_likely: Callable[[Tensor], Tensor], vocab_size: int
) -> None:
    logits_RV = torch.zeros(4, vocab_size)
    logits_RV[0] = -torch.inf
    logits_RV[1, 2] = torch.nan
    logits_RV[2, 2] = torch.inf
    logits_RV[3, 3] = 1
    assert most_likely(logits_RV).tolist() == [NOTHING_TO_SAMPLE] * 3 + [3]
    drawn = draw(logits_RV).tolist()
    assert drawn[:3] == [NOTHING_TO_SAMPLE] * 3
    assert drawn[3] in range(vocab_size)


@pytest.mark.parametrize("most_likely", GREEDY)
def test_greedy_takes_the_lowest_id_of_a_tie(most_likely: Callable[[Tensor], Tensor]) -> None:
    logits_RV = torch.zeros(3, 40_000)
    logits_RV[1, [5, 77, 39_999]] = 3
    logits_RV[2] = -torch.inf
    logits_RV[2, [39_999, 21]] = -3
    assert most_likely(logits_RV).tolist() == [0, 5, 21]


@pytest.mark.parametrize("num_top", [0, 1, 5, 40, 100])
def test_gather_logprobs(num_top: int) -> None:
    logits_RV = logits_of("ties", 6, vocab=40)
    token_ids_R = torch.tensor([0, 39, 3, 3, 17, 8])
    chosen_R, rank_R, top_RK, top_logprobs_RK = gather_logprobs(logits_RV, token_ids_R, num_top)
    for row, token_id in enumerate(token_ids_R.tolist()):
        logprobs = logits_RV[row].log_softmax(dim=0).tolist()
        expected = sorted(enumerate(logprobs), key=lambda pair: (-pair[1], pair[0]))[:num_top]
        assert chosen_R[row].item() == pytest.approx(logprobs[token_id], rel=1e-6)
        assert rank_R[row] == 1 + sum(other > logprobs[token_id] for other in logprobs)
        assert top_logprobs_RK[row].tolist() == pytest.approx([logprob for _, logprob in expected], rel=1e-6)
        # Which of the tokens that tie for the last place are in is free; before that, ids ascend within a tie.
        certain = [token_id for token_id, logprob in expected if logprob > expected[-1][1]]
        assert top_RK[row].tolist()[: len(certain)] == certain


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", FILTERS)
def test_no_filter_hides_a_broken_row(name: str, broken: float) -> None:
    ours, _, off, values = FILTERS[name]
    logits_RV = logits_of("random", len(values))
    logits_RV[:, 5] = broken
    filtered_RV = ours(logits_RV, torch.tensor(values, dtype=torch.int64 if isinstance(off, int) else torch.float64))
    assert (draw(filtered_RV) == NOTHING_TO_SAMPLE).all()
