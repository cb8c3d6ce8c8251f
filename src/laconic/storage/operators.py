"""The operators a stored graph may name: pure functions, by an explicit list.

Allowed are the operators that `program.operators` describes, the further ones below, and
Laconic's own (`laconic.*`); of these only overloads that write nothing. Nothing else is looked up:
a name from a file never reaches `getattr` before it was found in the list.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from laconic.core.errors import StorageError
from laconic.program.operators import table

_POINTWISE = """
    __lshift__ __rshift__ abs acos acosh angle asin asinh atan atan2 atanh bitwise_left_shift
    bitwise_right_shift bitwise_xor ceil clamp_max clamp_min conj_physical copysign cos cosh
    deg2rad digamma equal erf erfc erfinv exp exp2 expm1 floor fmax fmin frac gcd heaviside hypot
    i0 isfinite isneginf isposinf isreal lcm ldexp lgamma log log10 log1p log2 logaddexp
    logaddexp2 logit neg positive rad2deg real imag reciprocal round rsqrt sgn sign signbit sin
    sinc sinh special_erfcx special_xlog1py sqrt tan trunc xlogy arccos arccosh arcsin arcsinh
    arctan arctan2 arctanh absolute negative subtract multiply divide greater greater_equal less
    less_equal not_equal special_expit special_logit special_log1p fix
"""
_OTHERS = """
    _assert_async _cdist_forward _embedding_bag _fft_c2c _fft_c2r _fft_r2c _native_batch_norm_legit
    _native_batch_norm_legit_no_training _native_batch_norm_legit_functional _pdist_forward
    _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math
    _unsafe_index _upsample_bicubic2d_aa affine_grid_generator alias_copy aminmax as_strided
    as_strided_copy atleast_1d atleast_2d atleast_3d bilinear bincount block_diag
    broadcast_tensors cartesian_prod cdist chain_matmul col2im column_stack combinations complex
    cosine_similarity cross cummax cummin cumulative_trapezoid diag diag_embed diagonal
    diagonal_copy diagonal_scatter dstack embedding_bag fft_fft fft_fft2 fft_fftfreq
    fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft fft_irfft2
    fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn fliplr flipud grid_sampler
    grid_sampler_2d grid_sampler_3d gru hamming_window hann_window histc hsplit hstack vsplit
    dsplit index_add index_copy index_fill inner isin istft kron kthvalue
    linalg_cross linalg_matrix_norm linalg_multi_dot linalg_norm linalg_vecdot lstm masked_scatter
    masked_select matrix_power max_unpool2d max_unpool3d median meshgrid mode moveaxis
    nanmedian native_batch_norm native_group_norm
    native_channel_shuffle new_empty_strided nonzero nonzero_numpy normal_functional
    one_hot pairwise_distance permute_copy pixel_shuffle put rand_like randint randint_like
    randperm ravel renorm repeat_interleave rnn_relu rnn_tanh rot90 row_stack scatter scatter_add
    scatter_reduce searchsorted slice_inverse soft_margin_loss special_softmax special_log_softmax
    split_copy squeeze_copy stft sum_to_size swapdims sym_numel sym_size sym_storage_offset
    sym_stride t_copy take take_along_dim tensordot trace transpose_copy trapezoid
    triu_indices unbind_copy unfold_copy unique_consecutive unique_dim _unique2
    unsafe_split unsafe_split_with_sizes unsqueeze_copy vander vdot
    view_as_complex view_as_real view_copy vstack
    cross_entropy_loss mse_loss l1_loss smooth_l1_loss huber_loss nll_loss nll_loss_nd
    binary_cross_entropy binary_cross_entropy_with_logits kl_div
"""
_PYTHON = """
    getitem add sub mul floordiv truediv mod pow neg abs eq ne lt le gt ge and_ or_ not_
"""
_MATH = ("trunc", "floor", "ceil", "sqrt")
_TORCH = ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum")


@functools.cache
def allowed() -> frozenset[str]:
    """Names without overload: `aten.conv2d`, `operator.mul`."""
    words = {f"aten.{word}" for word in (_POINTWISE + _OTHERS).split()}
    return frozenset(words | {name for name in table() if "." in name} | set(_functions()))


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    """Python functions that torch.export leaves for computing with sizes."""
    found: dict[str, Callable[..., Any]] = {
        f"operator.{n}": getattr(operator, n) for n in _PYTHON.split()
    }
    found |= {f"math.{name}": getattr(math, name) for name in _MATH}
    return found | {f"torch.{name}": getattr(torch, name) for name in _TORCH}


def name_of(target: Any) -> str:
    """The stored name of a node's target: `aten.conv2d.default`, `operator.mul`.

    Raises:
        StorageError: not on the list, or an overload that writes.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        if find(name) is target:
            return name
    for name, function in _functions().items():
        if function is target:
            return name
    raise _refused(str(target))


def find(name: str) -> Any:
    """The operator of that name.

    Raises:
        StorageError: not on the list, unknown to this torch, or an overload that writes.
    """
    if name in _functions():
        return _functions()[name]
    space, _, rest = name.partition(".")
    word, _, overload = rest.partition(".")
    own = space == "laconic" and name in {str(target) for target in _own()}
    if not own and (space != "aten" or f"aten.{word}" not in allowed()):
        raise _refused(name)
    packet = getattr(getattr(torch.ops, space), word, None)
    if packet is None or overload not in packet.overloads():
        raise StorageError(
            f"this torch ({torch.__version__}) has no operator {name}",
            hint="open the file with the torch version it was written with, or a newer one",
        )
    found = getattr(packet, overload)
    if found._schema.is_mutable:
        raise _refused(name)
    return found


def _own() -> list[Any]:
    """Operators registered by Laconic itself."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("laconic::")]
    packets = [getattr(torch.ops.laconic, n.split("::")[1].split(".")[0]) for n in names]
    return [getattr(packet, overload) for packet in packets for overload in packet.overloads()]


def _refused(name: str) -> StorageError:
    return StorageError(
        f"operator {name} is not on the list of pure operators",
        hint="express it with other operators, or describe it in a file of program/operators",
    )
