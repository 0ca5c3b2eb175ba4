"""bn_coefficients: the only place where a BatchNorm becomes a scale, a center and a shift. [C] vectors: no kernel needed."""

from torch import Tensor


def forward(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, var, weight, bias), all [C] -> (scale, center, shift), all [C], differentiable.

    ``center`` is a constant to autograd, so reductions against ``y - center`` stay exact when |mean| is much larger than
    the standard deviation. ``shift`` equals ``bias`` in value and carries the gradient with respect to ``mean``.
    """
    center = mean.detach()
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = weight.to(scale.dtype) * scale
    shift = scale * (center - mean)
    if bias is not None:
        shift = shift + bias.to(scale.dtype)
    return scale, center, shift
