"""What quantizing costs: perplexity, and how far the distribution of the next token moves, on held-out text."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

AT_ONCE = 512  # tokens whose logits are compared at a time


@dataclass
class Quality:
    """Sums over the tokens judged, of a model and of the one that it is compared with."""

    num_tokens: int = 0
    loss: float = 0.0  # nats
    reference_loss: float = 0.0
    kl: float = 0.0  # of reference ‖ model, nats
    num_same: int = 0  # most probable tokens
    layer_errors: dict[int, float] = field(default_factory=dict)  # ‖x - reference‖ / ‖reference‖ after each layer

    def add(self, logits_TV: Tensor, reference_TV: Tensor, token_ids_SL: Tensor) -> None:
        """Logits of all tokens of texts of one length; the last of each text predicts nothing."""
        num_texts, length = token_ids_SL.shape
        targets_T = token_ids_SL[:, 1:].flatten()
        found, expected = (each.view(num_texts, length, -1)[:, :-1].flatten(0, 1) for each in (logits_TV, reference_TV))
        for first in range(0, len(targets_T), AT_ONCE):
            rows = slice(first, first + AT_ONCE)
            self._add_rows(found[rows].float(), expected[rows].float(), targets_T[rows])

    def _add_rows(self, logits_TV: Tensor, reference_TV: Tensor, targets_T: Tensor) -> None:
        log_probs, reference = functional.log_softmax(logits_TV, 1), functional.log_softmax(reference_TV, 1)
        self.num_tokens += len(targets_T)
        self.loss += functional.nll_loss(log_probs, targets_T, reduction="sum").item()
        self.reference_loss += functional.nll_loss(reference, targets_T, reduction="sum").item()
        self.kl += functional.kl_div(log_probs, reference, reduction="sum", log_target=True).item()
        self.num_same += int((logits_TV.argmax(1) == reference_TV.argmax(1)).sum())

    def note_layer(self, layer: int, found: Tensor, expected: Tensor) -> None:
        self.layer_errors[layer] = ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()

    def summary(self) -> dict[str, Any]:
        count = max(1, self.num_tokens)
        worst = sorted(self.layer_errors.items(), key=lambda each: -each[1])[:5]
        perplexity, reference = (torch.tensor(loss / count).exp().item() for loss in (self.loss, self.reference_loss))
        return {
            "tokens": self.num_tokens,
            "perplexity": perplexity,
            "reference_perplexity": reference,
            "perplexity_change_percent": 100 * (perplexity / reference - 1),
            "kl_nats": self.kl / count,
            "top1_agreement": self.num_same / count,
            "worst_layers": [{"layer": layer, "error": error} for layer, error in worst],
        }
