"""SmoothQuant (arXiv:2211.10438): what is large in activations moves into the weights, where rounding has room for it.

s = amax(x)^α / amax(W)^(1-α) by column, over all products that read x; alpha is searched for each group of products.
"""

from torch import Tensor

ALPHAS = tuple(round(0.3 + 0.05 * step, 2) for step in range(13))  # 0.3 to 0.9
SMALLEST = 1e-5


def smoothing(x_amax_K: Tensor, weight_amax_K: Tensor, alpha: float) -> Tensor:
    return (x_amax_K.clamp_min(SMALLEST) ** alpha / weight_amax_K.clamp_min(SMALLEST) ** (1 - alpha)).clamp_min(
        SMALLEST
    )
