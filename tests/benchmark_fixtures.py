"""What the benchmarks' tests share: sizes at which a case takes no time."""

from __future__ import annotations

TINY = {
    "variant": "CCELLA", "num_channels": [8, 16], "attention_levels": [False, True], "num_head_channels": [0, 8],
    "num_res_blocks": 1, "norm_num_groups": 8, "cross_attention_dim": 32, "input_dim": 16, "num_latents": 4,
    "adapter_blocks": 2, "adapter_heads": 2, "adapter_time_dim": 16, "class_head_dim": 8,
}  # fmt: skip
