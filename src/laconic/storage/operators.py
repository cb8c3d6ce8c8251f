"""The operators a stored graph may name: pure functions, by an explicit list.

Allowed are the operators below, those that `program.operators` describes, and Laconic's own
(`laconic.*`); of these only overloads that write nothing. Nothing else is looked up:
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

_ATEN = """
    abs absolute acos acosh adaptive_avg_pool1d _adaptive_avg_pool2d adaptive_avg_pool2d
    _adaptive_avg_pool3d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d add addcdiv addcmul addmm adjoint affine_grid_generator alias alias_copy
    all alpha_dropout amax amin aminmax __and__ angle any arange arccos arccosh arcsin arcsinh
    arctan arctan2 arctanh argmax argmin as_strided as_strided_copy asin asinh _assert_async atan
    atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d baddbmm
    batch_norm bernoulli bilinear binary_cross_entropy binary_cross_entropy_with_logits bincount
    bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor
    block_diag bmm broadcast_tensors broadcast_to bucketize cat cdist _cdist_forward ceil celu
    chain_matmul channel_shuffle chunk clamp clamp_max clamp_min clip clone col2im column_stack
    complex concat conj conj_physical constant_pad_nd contiguous conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d convolution copy copysign cos cosh
    cosine_similarity count_nonzero cross cross_entropy_loss cummax cummin cumprod cumsum
    cumulative_trapezoid deg2rad detach diag diag_embed diagonal diagonal_copy diagonal_scatter
    diff digamma div divide dot dropout dsplit dstack einsum elu embedding _embedding_bag
    embedding_bag empty empty_like eq equal erf erfc erfinv exp exp2 expand expand_as expand_copy
    expm1 eye feature_alpha_dropout feature_dropout _fft_c2c _fft_c2r fft_fft fft_fft2 fft_fftfreq
    fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft fft_irfft2
    fft_irfftn _fft_r2c fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn fill fix flatten flip fliplr
    flipud float_power floor floor_divide fmax fmin fmod frac frobenius_norm full full_like gather
    gcd ge gelu glu greater greater_equal grid_sampler grid_sampler_2d grid_sampler_3d group_norm
    gru gt hamming_window hann_window hardshrink hardsigmoid hardswish hardtanh heaviside histc
    hsplit hstack huber_loss hypot i0 im2col imag index index_add index_copy index_fill index_put
    index_select inner instance_norm isclose isfinite isin isinf isnan isneginf isposinf isreal
    istft kl_div kron kthvalue l1_loss layer_norm lcm ldexp le leaky_relu lerp less less_equal
    lgamma lift_fresh lift_fresh_copy linalg_cross linalg_matrix_norm linalg_multi_dot linalg_norm
    linalg_vecdot linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid _log_softmax
    log_softmax logaddexp logaddexp2 logcumsumexp logical_and logical_not logical_or logical_xor
    logit logspace logsumexp __lshift__ lstm lt mT masked_fill masked_scatter masked_select matmul
    matrix_power max max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices
    max_pool3d max_pool3d_with_indices max_unpool2d max_unpool3d maximum mean median meshgrid min
    minimum mish mm mode moveaxis movedim mse_loss mul multiply mv nan_to_num nanmean nanmedian
    nansum narrow native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional
    _native_batch_norm_legit_no_training native_channel_shuffle native_dropout native_group_norm
    native_layer_norm ne neg negative new_empty new_empty_strided new_full new_ones new_zeros
    nll_loss nll_loss_nd nonzero nonzero_numpy norm normal_functional not_equal numpy_T one_hot
    ones ones_like __or__ outer pad pairwise_distance _pdist_forward permute permute_copy
    pixel_shuffle pixel_unshuffle positive pow prelu prod put rad2deg rand rand_like randint
    randint_like randn randn_like randperm ravel real reciprocal reflection_pad1d reflection_pad2d
    reflection_pad3d relu relu6 remainder renorm repeat repeat_interleave replication_pad1d
    replication_pad2d replication_pad3d reshape reshape_as resolve_conj resolve_neg rms_norm
    rnn_relu rnn_tanh roll rot90 round row_stack rrelu __rshift__ rsqrt rsub scalar_tensor
    scaled_dot_product_attention _scaled_dot_product_attention_math
    _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu scatter scatter_add scatter_reduce searchsorted
    select select_scatter selu sgn sigmoid sign signbit silu sin sinc sinh slice slice_inverse
    slice_scatter smooth_l1_loss soft_margin_loss _softmax softmax softplus softshrink sort
    special_erfcx special_expit special_log1p special_log_softmax special_logit special_softmax
    special_xlog1py split split_copy split_with_sizes sqrt square squeeze squeeze_copy stack std
    std_mean stft sub subtract sum sum_to_size swapaxes swapdims sym_numel sym_size
    sym_storage_offset sym_stride t t_copy take take_along_dim tan tanh tensor_split tensordot
    threshold tile to _to_copy topk trace transpose transpose_copy trapezoid tril tril_indices
    triu triu_indices true_divide trunc type_as unbind unbind_copy unflatten unfold unfold_copy
    _unique2 unique_consecutive unique_dim unsafe_chunk _unsafe_index unsafe_split
    unsafe_split_with_sizes _unsafe_view unsqueeze unsqueeze_copy upsample_bicubic2d
    _upsample_bicubic2d_aa upsample_bilinear2d _upsample_bilinear2d_aa upsample_linear1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_trilinear3d vander var var_mean
    vdot view view_as view_as_complex view_as_real view_as_real_copy view_copy vsplit vstack
    _weight_norm where xlogy __xor__ zero zeros zeros_like
"""
_PYTHON = """
    getitem add sub mul floordiv truediv mod pow neg abs eq ne lt le gt ge and_ or_ not_
"""
_MATH = ("trunc", "floor", "ceil", "sqrt")
_TORCH = ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum")


@functools.cache
def allowed() -> frozenset[str]:
    """Names without overload: `aten.conv2d`, `operator.mul`."""
    words = {f"aten.{word}" for word in _ATEN.split()}
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
