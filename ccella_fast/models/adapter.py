"""The adapter: report features and timestep -> context tokens, and class logits along the way.

ELLA's timestep-aware resampler (Hu et al. 2024, arXiv 2403.05135) with 256 latents, plus CCELLA's class heads:
docs/explanation/method.md, sections 2.2 and 2.3.
Shapes: B batch, L text tokens, Q latents, E width of the adapter, H number of class outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.config import ModelConfig
from ccella_fast.kernels.attention import attention
from ccella_fast.models.blocks import Checkpointed, zero_module
from ccella_fast.models.embeddings import sinusoidal

_PIECE = 16384


def _chunked_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """`linear(x)` for very many inputs.

    With AMX, oneDNN's bf16 matrix product (3.12) ends the process with a division by zero for some of them, 8 rows of the
    reference's 196,608 among others. So on a CPU in bf16 the inputs go in pieces, whose results are added in fp32."""
    low = torch.is_autocast_enabled("cpu") or linear.weight.dtype == torch.bfloat16
    if x.device.type != "cpu" or not low or x.shape[1] <= _PIECE:
        return linear(x)
    pieces = zip(x.split(_PIECE, dim=1), linear.weight.split(_PIECE, dim=1), strict=True)
    parts = [F.linear(values, weight) for values, weight in pieces]
    total = torch.stack(parts).sum(0, dtype=torch.float32) + linear.bias.float()
    return total.to(parts[0].dtype)


class ClassHead(nn.Module):
    """All latents at once -> class logits: (B, Q, E) -> (B, classes)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.num_latents * config.cross_attention_dim, config.class_head_dim)
        self.fc2 = nn.Linear(config.class_head_dim, config.num_classes)

    def forward(self, latents: Tensor) -> Tensor:
        return self.fc2(F.relu(_chunked_linear(latents.flatten(1), self.fc1)))


class AdaptiveLayerNorm(nn.Module):
    """LayerNorm(v) * (1 + scale) + shift, where [shift, scale] = linear(embedding)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = zero_module(nn.Linear(width, 2 * width))

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """tokens (B, N, E), embedding (B, 1, E) after its SiLU."""
        shift, scale = self.linear(embedding).chunk(2, dim=-1)
        return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift


class LatentAttention(nn.MultiheadAttention):
    """Queries attend to keys and values. Parameters and their initialisation as `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, batch_first=True)

    def forward(self, queries: Tensor, source: Tensor) -> Tensor:  # type: ignore[override]
        """queries (B, Q, E), source (B, L, E) -> (B, Q, E)."""
        weight_q, weight_kv = self.in_proj_weight.split([self.embed_dim, 2 * self.embed_dim])
        bias_q, bias_kv = self.in_proj_bias.split([self.embed_dim, 2 * self.embed_dim])
        q = self._heads(F.linear(queries, weight_q, bias_q))
        k, v = map(self._heads, F.linear(source, weight_kv, bias_kv).chunk(2, dim=-1))
        return self.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class SquaredReluFeedForward(nn.Module):
    """c_proj(relu(c_fc v)^2)."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(tokens)).square())


class PerceiverBlock(nn.Module):
    """The latents attend to themselves and to the text; both norms and the feed-forward's know the timestep."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = LatentAttention(width, heads)
        self.mlp = SquaredReluFeedForward(width)
        self.ln_1 = AdaptiveLayerNorm(width)
        self.ln_2 = AdaptiveLayerNorm(width)
        self.ln_ff = AdaptiveLayerNorm(width)

    def forward(self, latents: Tensor, text: Tensor, embedding: Tensor) -> Tensor:
        queries = self.ln_1(latents, embedding)
        source = torch.cat([queries, self.ln_2(text, embedding)], dim=1)
        latents = latents + self.attn(queries, source)
        return latents + self.mlp(self.ln_ff(latents, embedding))


class Connector(Checkpointed):
    """The resampler proper, with class heads where the variant has them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, blocks = config.cross_attention_dim, config.adapter_blocks
        self.head = config.traits.head
        self.latents = nn.Parameter(torch.randn(config.num_latents, width) * width**-0.5)
        self.time_aware_linear = nn.Linear(width, width)
        self.proj_in = nn.Linear(config.input_dim, width)
        self.perceiver_blocks = nn.ModuleList(PerceiverBlock(width, config.adapter_heads) for _ in range(blocks))
        if self.head == "cascade":
            self.cascade_blocks = nn.ModuleList(ClassHead(config) for _ in range(blocks))
        elif self.head in ("first", "shared"):
            self.classifier = ClassHead(config)

    def forward(self, text: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor | None]:
        """text (B, L, input_dim), or fewer rows that repeat; embedding (B, 1, E) after its SiLU -> context (B, Q, E), head
        outputs (B, H) or None."""
        latents = self.latents + self.time_aware_linear(embedding)
        text = self.proj_in(text)  # one report at many timesteps is projected once
        if len(text) != len(embedding):
            text = text.repeat(len(embedding) // len(text), 1, 1)
        outputs = []
        for index, block in enumerate(self.perceiver_blocks):
            latents = self.run(block, latents, text, embedding)
            if self.head == "cascade":
                outputs.append(self.cascade_blocks[index](latents))
            elif self.head == "shared" or (self.head == "first" and index == 0):
                outputs.append(self.classifier(latents))
        return latents, torch.cat(outputs, dim=1) if outputs else None


class TimeEmbedding(nn.Module):
    """(B,) timesteps -> (B, E)."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.inputs = inputs
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timesteps: Tensor) -> Tensor:
        wave = sinusoidal(timesteps, self.inputs).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(wave)))


class Adapter(nn.Module):
    """text (B, L, input_dim), timesteps (B,) -> context (B, Q, E), head outputs (B, H) or None."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.time_embedding = TimeEmbedding(config.adapter_time_dim, config.cross_attention_dim)
        self.connector = Connector(config)

    def forward(self, text: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor | None]:
        embedding = F.silu(self.time_embedding(timesteps))[:, None]
        return self.connector(text.to(embedding.dtype), embedding)
