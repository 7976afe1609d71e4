"""The adapter, which turns report features and the timestep into context tokens and, in some variants, class logits.

It is the timestep-aware resampler of ELLA (Hu et al. 2024, arXiv 2403.05135) with 256 latents and the class heads of CCELLA:
docs/explanation/method.md, sections 2.2 and 2.3.

Shapes: B batch, L text tokens, Q latents, E width of the adapter, H outputs of all class heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.config import ModelConfig
from ccella_fast.kernels.attention import attention
from ccella_fast.models.blocks import Checkpointed, zero_module
from ccella_fast.models.embeddings import sinusoidal
from ccella_fast.models.linear import Linear, linear
from ccella_fast.models.wide_linear import WideLinear


class ClassHead(nn.Module):
    """A two-layer perceptron on all latents together."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc1 = WideLinear(config.num_latents * config.cross_attention_dim, config.class_head_dim)
        self.fc2 = nn.Linear(config.class_head_dim, config.num_classes)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (B, Q, E) -> class logits (B, num_classes)."""
        return self.fc2(F.relu(self.fc1(latents.flatten(1))))


class AdaptiveLayerNorm(nn.Module):
    """LayerNorm(tokens) * (1 + scale) + shift with [shift, scale] = linear(embedding)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = zero_module(nn.Linear(width, 2 * width))

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """tokens (B, N, E) and embedding (B, 1, E) after its SiLU -> (B, N, E)."""
        shift, scale = self.linear(embedding).chunk(2, dim=-1)
        return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift


class LatentAttention(nn.MultiheadAttention):
    """Multi-head attention with the parameters and the initialization of `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, batch_first=True)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        """queries (B, Q, E) attend to context (B, L, E) -> (B, Q, E)."""
        weight_q, weight_kv = self.in_proj_weight.split([self.embed_dim, 2 * self.embed_dim])
        bias_q, bias_kv = self.in_proj_bias.split([self.embed_dim, 2 * self.embed_dim])
        q = self._heads(linear(queries, weight_q, bias_q))
        k, v = map(self._heads, linear(context, weight_kv, bias_kv).chunk(2, dim=-1))
        return self.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class SquaredReluFeedForward(nn.Module):
    """c_proj(relu(c_fc(tokens))^2)."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, E) -> (B, N, E)."""
        return self.c_proj(F.relu(self.c_fc(tokens)).square())


class PerceiverBlock(nn.Module):
    """The latents attend to themselves and to the text, then a feed-forward network; all norms depend on the timestep."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = LatentAttention(width, heads)
        self.mlp = SquaredReluFeedForward(width)
        self.ln_1 = AdaptiveLayerNorm(width)
        self.ln_2 = AdaptiveLayerNorm(width)
        self.ln_ff = AdaptiveLayerNorm(width)

    def forward(self, latents: Tensor, text: Tensor, embedding: Tensor) -> Tensor:
        """latents (B, Q, E), text (B, L, E), embedding (B, 1, E) after its SiLU -> (B, Q, E)."""
        queries = self.ln_1(latents, embedding)
        context = torch.cat([queries, self.ln_2(text, embedding)], dim=1)
        latents = latents + self.attn(queries, context)
        return latents + self.mlp(self.ln_ff(latents, embedding))


class Connector(Checkpointed):
    """The resampler, with the class heads of the variant."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, blocks = config.cross_attention_dim, config.adapter_blocks
        self.head = config.traits.head
        self.latents = nn.Parameter(torch.randn(config.num_latents, width) * width**-0.5)
        self.time_aware_linear = nn.Linear(width, width)
        self.proj_in = Linear(config.input_dim, width)
        self.perceiver_blocks = nn.ModuleList(PerceiverBlock(width, config.adapter_heads) for _ in range(blocks))
        if self.head == "cascade":
            self.cascade_blocks = nn.ModuleList(ClassHead(config) for _ in range(blocks))
        elif self.head in ("first", "shared"):
            self.classifier = ClassHead(config)

    def forward(self, text: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor | None]:
        """Resample the text at the timesteps of the embedding.

        Args:
            text: (B, L, input_dim), or fewer rows, a divisor of B, which are repeated.
            embedding: (B, 1, E), after its SiLU.

        Returns:
            The context (B, Q, E), and the outputs of the class heads (B, H) or None.
        """
        latents = self.latents + self.time_aware_linear(embedding)
        text = self.proj_in(text)  # before repeating: one report at many timesteps is projected once
        if len(text) != len(embedding):
            text = text.repeat(len(embedding) // len(text), 1, 1)
        head_outputs = []
        for index, block in enumerate(self.perceiver_blocks):
            latents = self.run_module(block, latents, text, embedding)
            if self.head == "cascade":
                head_outputs.append(self.cascade_blocks[index](latents))
            elif self.head == "shared" or (self.head == "first" and index == 0):
                head_outputs.append(self.classifier(latents))
        return latents, torch.cat(head_outputs, dim=1) if head_outputs else None


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the timestep and a two-layer perceptron."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.inputs = inputs
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timesteps: Tensor) -> Tensor:
        """(B,) -> (B, E)."""
        embedding = sinusoidal(timesteps, self.inputs).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(embedding)))


class Adapter(nn.Module):
    """The timestep embedding and the resampler."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.time_embedding = TimeEmbedding(config.adapter_time_dim, config.cross_attention_dim)
        self.connector = Connector(config)

    def forward(self, text: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the context of a report at given timesteps.

        Args:
            text: (B, L, input_dim), or fewer rows, a divisor of B, which are repeated.
            timesteps: (B,), integer or float.

        Returns:
            The context (B, Q, E), and the outputs of the class heads (B, H) or None.
        """
        embedding = F.silu(self.time_embedding(timesteps))[:, None]
        return self.connector(text.to(embedding.dtype), embedding)
