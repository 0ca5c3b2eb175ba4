"""scale_shift_act followed by the mean over H and W, in plain PyTorch: the definition of correct. Maths: README.md here."""

from torch import Tensor

from ..common.layout import stats_dtype
from ..scale_shift_act import reference as pointwise


def forward(y, scale, center, shift, residual, res_scale, res_center, res_shift, relu: bool) -> Tensor:
    z = pointwise.pre_activation(y, scale, center, shift, residual, res_scale, res_center, res_shift)
    return (z.relu() if relu else z).mean((2, 3)).to(y.dtype)  # [N, C]


def spread(grad: Tensor, y: Tensor) -> Tensor:
    """The gradient of a mean over H and W, [N, C] -> [N, C, H, W] (a view), in float32 or wider."""
    positions = max(y.shape[2] * y.shape[3], 1)
    return (grad.to(stats_dtype(y.dtype)) / positions)[:, :, None, None].expand(y.shape)


def backward(
    grad, y, scale, center, shift, residual, res_scale, res_center, res_shift, relu: bool, need_residual: bool
) -> tuple[Tensor, ...]:
    return pointwise.backward(
        spread(grad, y), y, scale, center, shift, residual, res_scale, res_center, res_shift, relu, need_residual
    )
