"""From logits to token ids: filters, a counter-based generator, the Gumbel-max draw, logprobs.

    logits_RV  apply_temperature → filter_top_k → filter_typical_p → filter_top_p → filter_min_p → sample → token_ids_R
    seeds_R, positions_R, token ids → uniform ──────────────────────────────────────────────────────↗

`choose` is all of it, by what a SlotTable holds of each row's slot; on a GPU it is two kernels
(kernels/triton/sampling.py), which are recorded with the step.

Shape suffixes: R rows (one sequence each), V vocabulary, K alternatives (reported, or left by the filters), N a subset
of the rows, S slots, T tokens of a step.

The filters take float32, and their parameters (temperature_R, top_k_R, ...) on the host: a filter no row needs costs
nothing. A filter sets what it removes to -inf, and agrees with the logits warper of transformers
(generation/logits_process.py), the rule of at least one token included.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.cpu.library import native
from slipstream.kernels.fits import need, need_floats
from slipstream.kernels.registry import op
from slipstream.schema.sampling import SamplingParams
from slipstream.schema.step import PENDING

NOTHING_TO_SAMPLE = -1  # the token id of a row that is no distribution: NaN, +inf, or every token banned


@dataclass(frozen=True)
class Filters:
    """How each row cuts its distribution. Host tensors [R]; the meanings are those of SamplingParams."""

    temperature: Tensor  # float64, above 0; 1 leaves the row alone
    top_k: Tensor  # int64; 0 keeps all
    typical_p: Tensor  # float64; 1 keeps all
    top_p: Tensor  # float64; 1 keeps all
    min_p: Tensor  # float64; 0 keeps all


class SlotTable:
    """How each slot samples, and what it sampled last, where the logits are. Rows of slot -1 are greedy.

    A plan may name a token before it is known (PENDING): fill_pending reads it here. A slot's row is written once, when
    its sequence starts, so a step's choices cost no copy.
    """

    def __init__(self, num_slots: int, device: torch.device, *, is_batch_invariant: bool = False) -> None:
        """is_batch_invariant: what a row draws depends to the last bit on that row alone (on a CPU it does anyway)."""
        self._is_batch_invariant = is_batch_invariant
        # [S + 1, 8] in int64, floats by their bits: temperature, typical_p, top_p, min_p, top_k, seed, is_greedy, -.
        # The last row is of slot -1.
        self.numbers = torch.zeros((num_slots + 1, 8), dtype=torch.int64, device=device)
        self.numbers[:, 6] = 1
        self.last_token = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self._random: set[int] = set()  # slots that are not greedy

    def write(self, slot: int, sampling: SamplingParams, seed: int) -> None:
        """Steps that were launched before see what was there before."""
        (self._random.discard if sampling.is_greedy else self._random.add)(slot)
        row = torch.empty(8, dtype=torch.int64, pin_memory=self.numbers.is_cuda)
        row.view(torch.float64)[:4] = torch.tensor(
            (sampling.temperature, sampling.typical_p, sampling.top_p, sampling.min_p), dtype=torch.float64
        )
        row[4:] = torch.tensor((min(sampling.top_k, 2**62), seed, int(sampling.is_greedy), 0))
        self.numbers[slot].copy_(row, non_blocking=True)

    def fill_pending(self, token_ids_T: Tensor, slots_T: Tensor) -> None:
        """In place: where a token is PENDING, what its slot sampled last, or any token where that failed."""
        if token_ids_T.is_cuda:
            from slipstream.kernels.triton import sampling

            sampling.fill_pending(token_ids_T, slots_T, self.last_token)
        else:
            token_ids = token_ids_T.numpy()  # some times as fast as torch where there are few
            is_pending = token_ids == PENDING
            if is_pending.any():
                token_ids[is_pending] = self.last_token.numpy()[slots_T.numpy()[is_pending]].clip(min=0)

    def choose(self, logits_RV: Tensor, slots_R: Tensor, positions_R: Tensor, greedy_R: Tensor | None = None) -> Tensor:
        """The next token of each row, kept as its slot's last: drawn at that position, or the most likely one.

        greedy_R: the most likely ones, where they are known already; it becomes the result.
        -> token_ids_R, NOTHING_TO_SAMPLE for a row that is no distribution. On a GPU nothing waits for it.
        """
        if logits_RV.is_cuda:
            from slipstream.kernels.triton import sampling

            return sampling.choose(
                logits_RV, slots_R, positions_R, self.numbers, self.last_token, self._is_batch_invariant
            )
        token_ids_R = greedy(logits_RV) if greedy_R is None else greedy_R
        if self._random:
            self._draw(logits_RV, slots_R, positions_R, token_ids_R)
        self.last_token.numpy()[slots_R.numpy()] = token_ids_R.numpy()
        return token_ids_R

    def _draw(self, logits_RV: Tensor, slots_R: Tensor, positions_R: Tensor, token_ids_R: Tensor) -> None:
        """In place: the tokens of rows that are not greedy."""
        numbers_RX = self.numbers[slots_R]
        random_N = (numbers_RX[:, 6] == 0).nonzero()[:, 0]
        if len(random_N):
            numbers_NX = numbers_RX[random_N]
            temperature, typical_p, top_p, min_p = numbers_NX.view(torch.float64)[:, :4].unbind(1)
            filters = Filters(temperature, numbers_NX[:, 4], typical_p, top_p, min_p)
            filtered_NV = apply_filters(logits_RV[random_N].float(), filters)
            token_ids_R[random_N] = sample(filtered_NV, numbers_NX[:, 5], positions_R[random_N])


def apply_filters(logits_RV: Tensor, filters: Filters) -> Tensor:
    """All filters, in the order that SamplingParams promises. The input is not changed."""
    logits_RV = apply_temperature(logits_RV, filters.temperature)
    logits_RV = filter_top_k(logits_RV, filters.top_k)
    logits_RV = filter_typical_p(logits_RV, filters.typical_p)
    logits_RV = filter_top_p(logits_RV, filters.top_p)
    return filter_min_p(logits_RV, filters.min_p)


def apply_temperature(logits_RV: Tensor, temperature_R: Tensor) -> Tensor:
    if bool((temperature_R == 1).all()):
        return logits_RV
    return logits_RV / _column(temperature_R, logits_RV)


def filter_top_k(logits_RV: Tensor, top_k_R: Tensor) -> Tensor:
    """Keep the k largest; every token that ties with the k-th stays."""
    vocab_size = logits_RV.shape[1]

    def remove(logits_NV: Tensor, rows_N: Tensor) -> Tensor:
        k_N = top_k_R[rows_N]
        largest_NK = logits_NV.topk(int(k_N.max()), dim=1).values
        smallest_kept_N1 = largest_NK.gather(1, (k_N - 1)[:, None].to(logits_NV.device))
        return logits_NV < smallest_kept_N1

    return _filter_rows(logits_RV, (top_k_R > 0) & (top_k_R < vocab_size), remove)


def filter_typical_p(logits_RV: Tensor, typical_p_R: Tensor) -> Tensor:
    """Locally typical sampling (arXiv:2202.00666): keep the tokens with surprise nearest to the entropy, to mass p."""

    def remove(logits_NV: Tensor, rows_N: Tensor) -> Tensor:
        logprobs_NV = logits_NV.log_softmax(dim=1)
        entropy_N1 = -(logprobs_NV * logprobs_NV.exp()).nansum(dim=1, keepdim=True)
        distance_NV = (-logprobs_NV - entropy_N1).abs()
        sorted_NV, order_NV = distance_NV.sort(dim=1, stable=True)
        mass_NV = logits_NV.gather(1, order_NV).softmax(dim=1).cumsum(dim=1)
        last_N1 = (mass_NV < _column(typical_p_R[rows_N], logits_NV)).sum(dim=1, keepdim=True)
        return distance_NV > sorted_NV.gather(1, last_N1.clamp(max=logits_NV.shape[1] - 1))

    return _filter_rows(logits_RV, typical_p_R < 1, remove)


def filter_top_p(logits_RV: Tensor, top_p_R: Tensor) -> Tensor:
    """Nucleus sampling (arXiv:1904.09751): keep the smallest set of most likely tokens with mass of at least p.

    Where equal logits straddle the border, the lower token ids stay (transformers leaves that to an unstable sort), so
    that a top_p near 0 is greedy.
    """

    def remove(logits_NV: Tensor, rows_N: Tensor) -> Tensor:
        descending_NV, order_NV = logits_NV.sort(dim=1, descending=True, stable=True)
        # The mass of a token and all below it, summed from the smallest up as transformers does: equal to the last bit.
        mass_NV = descending_NV.flip(1).softmax(dim=1).cumsum(dim=1).flip(1)
        remove_sorted_NV = mass_NV <= _column(1 - top_p_R[rows_N], logits_NV)
        remove_sorted_NV[:, 0] = False
        return remove_sorted_NV.scatter(1, order_NV, remove_sorted_NV)

    return _filter_rows(logits_RV, top_p_R < 1, remove)


def filter_min_p(logits_RV: Tensor, min_p_R: Tensor) -> Tensor:
    """Keep the tokens with at least min_p times the probability of the most likely one (arXiv:2407.01082)."""

    def remove(logits_NV: Tensor, rows_N: Tensor) -> Tensor:
        probs_NV = logits_NV.softmax(dim=1)
        return probs_NV < _column(min_p_R[rows_N], logits_NV) * probs_NV.amax(dim=1, keepdim=True)

    return _filter_rows(logits_RV, min_p_R > 0, remove)


def _one_a_row(logits_RV: Tensor) -> Tensor:
    need_floats(logits=logits_RV)
    num_rows, vocab_size = logits_RV.shape
    need(vocab_size > 0, "logits must be of one token at least")
    return logits_RV.new_empty(num_rows, dtype=torch.int64)


@op("greedy(Tensor logits) -> Tensor", shapes=_one_a_row, is_row_by_row=True)
def greedy(logits_RV: Tensor) -> Tensor:
    """The most likely token of each row, the lowest id where several tie. -> token_ids_R."""
    largest_R, token_ids_R = logits_RV.max(dim=1)
    return token_ids_R.where(largest_R.isfinite(), NOTHING_TO_SAMPLE)


native(greedy)


def sample(logits_RV: Tensor, seeds_R: Tensor, positions_R: Tensor) -> Tensor:
    """Draw from softmax(logits) by the Gumbel-max trick: the largest of logit + noise wins. -> token_ids_R.

    Each token has noise of its own, so a rounding error in the logits (another batch size, another kernel) changes the
    choice only where the two best are that close: about as often as the error is large. Inverting a cumulative sum
    would let it shift every border of the vocabulary at once.

    positions_R is the index of the token in its sequence (prompt and output), so that neither the batch nor a
    preemption changes what a seed draws.
    """
    vocab_size = logits_RV.shape[1]
    largest_R = logits_RV.amax(dim=1)
    num_candidates = int((logits_RV > -torch.inf).sum(dim=1).amax())
    if num_candidates * 16 < vocab_size:  # after top-k or top-p: noise for the few that are left
        candidates_RK, token_ids_RK = logits_RV.topk(max(1, num_candidates), dim=1)
        u_RK4 = uniform(seeds_R, positions_R, token_ids_RK >> 2)
        u_RK = u_RK4.gather(2, (token_ids_RK & 3)[:, :, None])[:, :, 0]
        winner_R1 = (candidates_RK + _gumbel(u_RK)).argmax(dim=1, keepdim=True)
        token_ids_R = token_ids_RK.gather(1, winner_R1)[:, 0]
    else:
        quads_1G = torch.arange(-(-vocab_size // 4), device=logits_RV.device)[None]
        u_RV = uniform(seeds_R, positions_R, quads_1G).flatten(1)[:, :vocab_size]
        token_ids_R = (logits_RV + _gumbel(u_RV)).argmax(dim=1)
    return token_ids_R.where(largest_R.isfinite(), NOTHING_TO_SAMPLE)


def gather_logprobs(logits_RV: Tensor, token_ids_R: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (logprob_R and rank_R of the given tokens, ids top_RK and logprobs top_logprobs_RK of the most likely).

    Rank 1 is the most likely token: 1 + the number of tokens with a strictly greater logprob. K is num_top, or V where
    that is less. Among equal logprobs the lower id comes first, as in greedy.
    """
    vocab_size = logits_RV.shape[1]
    if vocab_size % 4:  # a GPU sums a row that begins between its words of 16 bytes in another order
        padded_RX = functional.pad(logits_RV, (0, -vocab_size % 4), value=-torch.inf)
        logprobs_RV = padded_RX.log_softmax(dim=1)[:, :vocab_size]
    else:
        logprobs_RV = logits_RV.log_softmax(dim=1)
    chosen_R1 = logprobs_RV.gather(1, token_ids_R[:, None])
    rank_R = 1 + (logprobs_RV > chosen_R1).sum(dim=1)
    # topk orders ties as it likes; sort its few columns by id, then, keeping that order among equals, by logprob.
    top_RK = logprobs_RV.topk(min(num_top, logits_RV.shape[1]), dim=1).indices.sort(dim=1).values
    top_logprobs_RK, order_RK = logprobs_RV.gather(1, top_RK).sort(dim=1, descending=True, stable=True)
    return chosen_R1[:, 0], rank_R, top_RK.gather(1, order_RK), top_logprobs_RK


# Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11), the generator of cuRAND, torch
# on CUDA and Triton's tl.rand. A keyed hash of a counter: no state to save, so a token's randomness depends on nothing
# but its seed and position. Constants from the paper.
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter_4R: Tensor, key_2R: Tensor) -> Tensor:
    """Ten rounds over four 32-bit words a column, held in int64. -> words_4R."""
    multipliers_21 = counter_4R.new_tensor(_MULTIPLIERS)[:, None]
    key_steps_21 = counter_4R.new_tensor(_KEY_STEPS)[:, None]
    rounds_T11 = torch.arange(_ROUNDS, device=counter_4R.device)[:, None, None]
    keys_T2R = (key_2R + rounds_T11 * key_steps_21) & _MASK
    even_2R, odd_2R = counter_4R[0::2], counter_4R[1::2]
    for round_key_2R in keys_T2R:
        # Below 2**64, so int64 wraps to the right 64 bits; the shift's sign extension is masked away.
        product_2R = even_2R * multipliers_21
        high_2R, low_2R = (product_2R >> 32) & _MASK, product_2R & _MASK
        even_2R, odd_2R = high_2R.flip(0) ^ odd_2R ^ round_key_2R, low_2R.flip(0)
    return torch.stack((even_2R[0], odd_2R[0], even_2R[1], odd_2R[1]))


def uniform(seeds_R: Tensor, positions_R: Tensor, quads_RG: Tensor) -> Tensor:
    """Float64 in (0, 1), one for each of the token ids 4 * quad to 4 * quad + 3. -> u_RG4.

    The same (seed, position, token id) gives the same number on every device; a Philox counter makes four. A single
    row of quads serves all rows.
    """
    quads_RG = quads_RG.expand(len(seeds_R), -1)
    zeros_RG = torch.zeros_like(quads_RG)
    positions_R1, seeds_R1 = positions_R.to(quads_RG)[:, None], seeds_R.to(quads_RG)[:, None]
    counter = torch.stack((quads_RG, zeros_RG, zeros_RG + (positions_R1 & _MASK), zeros_RG + (positions_R1 >> 32)))
    key = torch.stack((zeros_RG + (seeds_R1 & _MASK), zeros_RG + ((seeds_R1 >> 32) & _MASK)))
    words_4RG = philox(counter.flatten(1), key.flatten(1)).view(4, *quads_RG.shape)
    return (words_4RG.permute(1, 2, 0).to(torch.float64) + 0.5) * 2.0**-32


def _gumbel(u: Tensor) -> Tensor:
    """Standard Gumbel noise: -log(u) is exponential, and the smallest exponential over p wins with probability p."""
    return (-torch.log(-torch.log(u))).float()


def _filter_rows(logits_RV: Tensor, needed_R: Tensor, remove: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Set to -inf what remove(logits_NV, rows_N) says, in the rows that need it; the others are not touched.

    A filter says what to remove, not what to keep: where comparisons fail, the NaN stays, and the row reports it.
    """
    rows_N = needed_R.nonzero()[:, 0]
    if len(rows_N) == 0:
        return logits_RV
    if len(rows_N) == len(logits_RV):
        return logits_RV.masked_fill(remove(logits_RV, rows_N), -torch.inf)
    device_rows_N = rows_N.to(logits_RV.device)
    logits_NV = logits_RV[device_rows_N]
    return logits_RV.index_copy(0, device_rows_N, logits_NV.masked_fill(remove(logits_NV, rows_N), -torch.inf))


def _column(parameter_R: Tensor, logits_RV: Tensor) -> Tensor:
    """A host parameter as a column beside the logits."""
    return parameter_R.to(logits_RV)[:, None]
