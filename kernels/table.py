"""The kernels by name, ``module:CONSTANT``; listing names imports nothing."""

from collections.abc import Mapping

KERNELS: Mapping[str, str] = {
    "quantize_rows": "vdqc.kernels.quantize_rows:QUANTIZE_ROWS",
    "quantize_rows_asym": "vdqc.kernels.quantize_rows:QUANTIZE_ROWS_ASYM",
    "quantize_static": "vdqc.kernels.quantize_rows:QUANTIZE_STATIC",
    "fused_quantize": "vdqc.kernels.fused_quantize:FUSED_QUANTIZE",
    "fused_quantize_asym": "vdqc.kernels.fused_quantize:FUSED_QUANTIZE_ASYM",
    "residual_quantize": "vdqc.kernels.fused_quantize:RESIDUAL_QUANTIZE",
    "residual_quantize_asym": "vdqc.kernels.fused_quantize:RESIDUAL_QUANTIZE_ASYM",
    "rope_quantize": "vdqc.kernels.rope_quantize:ROPE_QUANTIZE",
    "rope": "vdqc.kernels.rope_quantize:ROPE",
    "int8_matmul": "vdqc.kernels.integer:INT8_MATMUL",
    "packed_matmul": "vdqc.kernels.integer:PACKED_MATMUL",
    "int8_linear": "vdqc.kernels.int8_linear:INT8_LINEAR",
    "packed_linear": "vdqc.kernels.packed_linear:PACKED_LINEAR",
    "fp8_linear": "vdqc.kernels.fp8_linear:FP8_LINEAR",
    "group_linear": "vdqc.kernels.group_linear:GROUP_LINEAR",
    "weight_only_linear": "vdqc.kernels.weight_only_linear:WEIGHT_ONLY_LINEAR",
    "rotation": "vdqc.kernels.rotation:ROTATION",
    "attention": "vdqc.kernels.attention:ATTENTION",
    "block_mask_topk": "vdqc.kernels.block_mask:BLOCK_MASK_TOPK",
    "sparse_attention": "vdqc.kernels.sparse_attention:SPARSE_ATTENTION",
    "sparse_attention_int8": "vdqc.kernels.sparse_attention:SPARSE_ATTENTION_INT8",
    "video_mask": "vdqc.kernels.video_mask:VIDEO_MASK",
    "dense_mask": "vdqc.kernels.video_mask:DENSE_MASK",
    "key_order": "vdqc.kernels.video_mask:KEY_ORDER",
    "token_order": "vdqc.kernels.token_order:TOKEN_ORDER",
    "compare": "vdqc.kernels.compare:COMPARE",
}
