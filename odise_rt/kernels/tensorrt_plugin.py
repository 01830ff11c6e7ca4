"""mask_pool for TensorRT: two ahead-of-time plugins whose PTX is baked into the engine.

Importing this module needs nothing; :func:`register` needs ``tensorrt`` from 10.9 on and ``mask_pooling.ptx`` from
``make kernels``. It registers ``odise_rt::mask_pool_sums`` (logits (B, Q, H, W), features (B, C, H, W) to sums
(B, splits, Q, C) and counts (B, splits, Q)) and ``odise_rt::mask_pool_finish`` (these and the features, which only lend
their type, to pooled (B, Q, C) and areas (B, Q)), for float16 and bfloat16. An engine that holds them needs neither
Python nor a plugin library.

``export.build_engines`` does not use them: its networks come from ONNX graphs of standard operators, and pool masks in
float32 by a matrix product. They are for networks that are put together by TensorRT's own API: :func:`add_mask_pool`
adds both between two tensors of such a network, before it is built.

Written to the documentation of ``tensorrt.plugin`` (``register``, ``autotune``, ``aot_impl``) and never run: TensorRT
cannot be installed where this was written. Tests hold the numbers of the launch to the kernels' own plan, and the two
layers to what they are given, with stand-ins for the package and for a network. Compare an engine that holds them with
PyTorch before you trust it.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from odise_rt.errors import MissingPackageError
from odise_rt.kernels.launch_plans import (
    BFLOAT16,
    FINISH_CHANNELS,
    FLOAT16,
    POOL_CHANNELS,
    POOL_PIXELS,
    POOL_THREADS,
    POOL_WARPS,
    SUFFIX,
)
from odise_rt.kernels.native import kernel_file

SPLITS = 66
"""Shares of the pixels of an image: with the two blocks of each that 256 channels take, one block for each
multiprocessor of a Hopper GPU. A fixed number, because the workspace between the two plugins is a tensor whose shape is
part of the engine."""
ROW_TILES = 8
STAGES = 3
"""Stages in shared memory: three are what fits into the 48 KiB that every kernel may use without asking."""
SUMS, FINISH = "odise_rt::mask_pool_sums", "odise_rt::mask_pool_finish"


def import_plugin_api() -> tuple[Any, Any]:
    """The packages ``tensorrt`` and ``tensorrt.plugin``.

    Raises:
        MissingPackageError: TensorRT is missing, or too old for ahead-of-time plugins.
    """
    try:
        import tensorrt
        import tensorrt.plugin
    except ImportError as exc:
        raise MissingPackageError(
            "the mask_pool plugin needs TensorRT, which is not installed: pip install 'odise_rt[tensorrt]'"
        ) from exc
    if not hasattr(tensorrt.plugin, "aot_impl"):
        raise MissingPackageError(
            f"the mask_pool plugin needs tensorrt 10.9 or newer, this is {tensorrt.__version__}: "
            "pip install -U tensorrt"
        )
    return tensorrt, tensorrt.plugin


@functools.cache
def register() -> None:
    """Register both plugins with TensorRT; once a process.

    Raises:
        MissingPackageError: TensorRT is missing or too old.
        BackendError: ``mask_pooling.ptx`` is not built.
    """
    trt, plugin = import_plugin_api()
    ptx = kernel_file("mask_pooling.ptx").read_bytes()

    def dtype_of(description: Any) -> int:
        return FLOAT16 if description.dtype == trt.float16 else BFLOAT16

    # Annotations are read by TensorRT, so they are set from its own types rather than written.
    tensor: Any = plugin.TensorDesc
    two_tensors = types.GenericAlias(tuple, (tensor, tensor))
    kernel = types.GenericAlias(tuple, (str, bytes, plugin.KernelLaunchParams, plugin.SymExprs))

    def sums_shape(logits, features):  # type: ignore[no-untyped-def]
        batch, queries = logits.shape_expr[0], logits.shape_expr[1]
        channels = features.shape_expr[1]
        return (
            plugin.from_shape_expr((batch, SPLITS, queries, channels), dtype=trt.float32),
            plugin.from_shape_expr((batch, SPLITS, queries), dtype=trt.int32),
        )

    sums_shape.__annotations__ = {"logits": tensor, "features": tensor, "return": two_tensors}
    plugin.register(SUMS)(sums_shape)

    def sums_types(logits, features, outputs):  # type: ignore[no-untyped-def]
        return [plugin.AutoTuneCombination("FP16|BF16, FP16|BF16, FP32, INT32", "LINEAR")]

    plugin.autotune(SUMS)(sums_types)

    def sums_kernel(logits, features, outputs, tactic):  # type: ignore[no-untyped-def]
        batch, queries, height, width = (logits.shape_expr[i] for i in range(4))
        channels = features.shape_expr[1]
        launch = plugin.KernelLaunchParams()
        launch.grid_x = SPLITS
        launch.grid_y = plugin.cdiv(queries, 16 * ROW_TILES) * plugin.cdiv(channels, POOL_CHANNELS)
        launch.grid_z = batch
        launch.block_x = POOL_THREADS
        launch.shared_mem = STAGES * (16 * ROW_TILES + POOL_CHANNELS) * POOL_PIXELS * 2
        numbers = _numbers(plugin, [queries, channels, height * width, SPLITS, STAGES])
        return f"odise_pool_sums_{SUFFIX[dtype_of(features)]}_{ROW_TILES}", ptx, launch, numbers

    sums_kernel.__annotations__ = {"return": kernel}
    plugin.aot_impl(SUMS)(sums_kernel)

    def finish_shape(sums, counts, features):  # type: ignore[no-untyped-def]
        batch, queries, channels = sums.shape_expr[0], sums.shape_expr[2], sums.shape_expr[3]
        return (
            plugin.from_shape_expr((batch, queries, channels), dtype=features.dtype),
            plugin.from_shape_expr((batch, queries), dtype=trt.int32),
        )

    finish_shape.__annotations__ = {
        "sums": tensor, "counts": tensor, "features": tensor, "return": two_tensors,
    }  # fmt: skip
    plugin.register(FINISH)(finish_shape)

    def finish_types(sums, counts, features, outputs):  # type: ignore[no-untyped-def]
        return [plugin.AutoTuneCombination("FP32, INT32, FP16|BF16, FP16|BF16, INT32", "LINEAR")]

    plugin.autotune(FINISH)(finish_types)

    def finish_kernel(sums, counts, features, outputs, tactic):  # type: ignore[no-untyped-def]
        batch, queries, channels = sums.shape_expr[0], sums.shape_expr[2], sums.shape_expr[3]
        launch = plugin.KernelLaunchParams()
        launch.grid_x = plugin.cdiv(channels, FINISH_CHANNELS)
        launch.grid_y = queries
        launch.grid_z = batch
        launch.block_x = POOL_THREADS
        launch.shared_mem = (POOL_WARPS * FINISH_CHANNELS + 1) * 4
        name = f"odise_pool_finish_after_{SUFFIX[dtype_of(features)]}"
        return name, ptx, launch, _numbers(plugin, [queries, channels, SPLITS])

    finish_kernel.__annotations__ = {"return": kernel}
    plugin.aot_impl(FINISH)(finish_kernel)


def add_mask_pool(network: Any, logits: Any, features: Any) -> tuple[Any, Any]:
    """Put mask pooling into a network, registering the plugins first where that was not done.

    Args:
        network: a TensorRT ``INetworkDefinition``.
        logits: tensor (B, Q, H, W), float16 or bfloat16.
        features: tensor (B, C, H, W) of the same type.

    Returns:
        Tensors pooled (B, Q, C) of that type and areas (B, Q) of int32.

    Raises:
        MissingPackageError: TensorRT is missing or too old.
        BackendError: ``mask_pooling.ptx`` is not built.
    """
    _, plugin = import_plugin_api()
    register()
    namespace = plugin.op.odise_rt
    summed = network.add_plugin(namespace.mask_pool_sums(logits, features), aot=True)
    sums, counts = summed.get_output(0), summed.get_output(1)
    finished = network.add_plugin(namespace.mask_pool_finish(sums, counts, features), aot=True)
    return finished.get_output(0), finished.get_output(1)


def _numbers(plugin: Any, values: list[Any]) -> Any:
    """Arguments between input and output pointers, each a 32-bit integer."""
    return plugin.SymIntExprs.from_tuple([plugin.SymInt32(value) for value in values])
