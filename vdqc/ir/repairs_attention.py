"""Repairs of forwards that drop padded text tokens sample by sample: masks instead.

Keys that a mask hides get a weight of exactly zero, so attention over padded tokens gives what
attention over the others alone gives, up to the order of summation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def valid_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Stable order that moves valid tokens first, and the mask in that order; both ``[B, T]``."""
    order = torch.argsort((~mask).to(torch.int32), dim=1, stable=True)
    return order, mask.gather(1, order)


def hunyuan_video15_forward(
    self: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    timestep_r: Tensor | None = None,
    encoder_hidden_states_2: Tensor | None = None,
    encoder_attention_mask_2: Tensor | None = None,
    image_embeds: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Any:
    """HunyuanVideo15Transformer3DModel without boolean indexing.

    The context is image, second and first text, valid tokens before invalid ones. Invalid text is
    zero; an image that is zero throughout (text to video) is invalid.
    """
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    assert encoder_hidden_states_2 is not None
    assert encoder_attention_mask_2 is not None
    assert image_embeds is not None
    batch, _, *sizes = hidden_states.shape
    patch = (self.config.patch_size_t, self.config.patch_size, self.config.patch_size)
    grid = [size // step for size, step in zip(sizes, patch, strict=True)]
    rope = self.rope(hidden_states)
    temb = self.time_embed(timestep, timestep_r=timestep_r)
    tokens = self.x_embedder(hidden_states)

    text = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
    text = text + self.cond_type_embed.weight[0]
    second = self.context_embedder_2(encoder_hidden_states_2) + self.cond_type_embed.weight[1]
    has_image = ~torch.all(image_embeds == 0)
    image = self.image_embedder(image_embeds)
    image = torch.where(has_image, image, image * 0.0) + self.cond_type_embed.weight[2]

    text_mask, second_mask = encoder_attention_mask.bool(), encoder_attention_mask_2.bool()
    mask = torch.cat([has_image.expand(image.shape[:2]), second_mask, text_mask], dim=1)
    context = torch.cat(
        [image, second * second_mask.unsqueeze(-1), text * text_mask.unsqueeze(-1)], dim=1
    )
    order, mask = valid_first(mask)
    context = context.gather(1, order.unsqueeze(-1).expand(context.shape))

    for block in self.transformer_blocks:
        tokens, context = block(tokens, context, temb, mask, rope)
    tokens = self.proj_out(self.norm_out(tokens, temb))
    # [B, F, H, W, C, pt, ph, pw] to [B, C, F pt, H ph, W pw]
    cells = tokens.reshape(batch, *grid, -1, *patch).permute(0, 4, 1, 5, 2, 6, 3, 7)
    sample = cells.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def mochi_attention(
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """MochiAttnProcessor2_0 in one attention over the batch.

    The original keeps each sample's valid text tokens, attends, and pads the result with zeros:
    here valid tokens are moved first, invalid keys are masked and their outputs are zero.
    """

    def split(x: Tensor, norm: Any) -> Tensor:
        heads = x.unflatten(2, (attn.heads, -1))
        return heads if norm is None else norm(heads)

    query = split(attn.to_q(hidden_states), attn.norm_q)
    key = split(attn.to_k(hidden_states), attn.norm_k)
    value = split(attn.to_v(hidden_states), None)
    if image_rotary_emb is not None:
        query = _rotate_pairs(query, *image_rotary_emb)
        key = _rotate_pairs(key, *image_rotary_emb)
    order, valid = valid_first(attention_mask.bool())
    context = encoder_hidden_states
    order = order[:, :, None, None].expand(-1, -1, attn.heads, query.shape[-1])
    context_query = split(attn.add_q_proj(context), attn.norm_added_q).gather(1, order)
    context_key = split(attn.add_k_proj(context), attn.norm_added_k).gather(1, order)
    context_value = split(attn.add_v_proj(context), None).gather(1, order)

    video_valid = valid.new_ones(query.shape[:2])
    mask = torch.cat([video_valid, valid], dim=1)
    attended = functional.scaled_dot_product_attention(
        torch.cat([query, context_query], dim=1).transpose(1, 2),
        torch.cat([key, context_key], dim=1).transpose(1, 2),
        torch.cat([value, context_value], dim=1).transpose(1, 2),
        attn_mask=mask[:, None, None, :],
    )
    attended = attended.transpose(1, 2).flatten(2, 3)
    tokens = hidden_states.shape[1]
    video = attn.to_out[1](attn.to_out[0](attended[:, :tokens]))
    text = attended[:, tokens:].masked_fill(~valid.unsqueeze(-1), 0.0)
    return video, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    real, imaginary = even * cos - odd * sin, even * sin + odd * cos
    return torch.stack([real.to(x.dtype), imaginary.to(x.dtype)], dim=-1).flatten(-2)


def lumina2_forward(
    self: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Any:
    """Lumina2Transformer2DModel with the text in a slot of its padded length.

    The original packs each sample's text and image without a gap. Attention does not see order,
    only the rotary positions that each token carries, so a gap of masked tokens changes nothing:
    the image's first position is the sample's own text length, as in the original.
    """
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    batch, channels, height, width = hidden_states.shape
    p = self.config.patch_size
    rows, columns = height // p, width // p
    temb, text = self.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
    # the original counts the mask and takes that many leading tokens
    length = encoder_attention_mask.sum(dim=1, keepdim=True)
    text_rope, image_rope = _lumina2_rope(self.rope_embedder, length, text.shape[1], rows, columns)
    cells = hidden_states.reshape(batch, channels, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1)
    image = self.x_embedder(cells.flatten(3).flatten(1, 2))

    for layer in self.context_refiner:
        text = layer(text, encoder_attention_mask, text_rope)
    for layer in self.noise_refiner:
        image = layer(image, None, image_rope, temb)
    tokens, rope = torch.cat([text, image], dim=1), torch.cat([text_rope, image_rope], dim=1)
    valid = torch.arange(text.shape[1], device=text.device) < length
    mask = torch.cat([valid, valid.new_ones(image.shape[:2])], dim=1)
    for layer in self.layers:
        tokens = layer(tokens, mask, rope, temb)
    tokens = self.norm_out(tokens, temb)[:, text.shape[1] :]
    cells = tokens.reshape(batch, rows, columns, p, p, self.out_channels)
    sample = cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _lumina2_rope(
    rope: Any, length: Tensor, padded: Any, rows: Any, columns: Any
) -> tuple[Tensor, Tensor]:
    """Complex rotary factors of text and image, ``[B, T, D / 2]``.

    Text token i stands at (i, 0, 0), image cell (r, c) at (length, r, c).
    """
    batch, device = length.shape[0], length.device
    text = torch.arange(padded, device=device).expand(batch, -1)
    zero = torch.zeros_like(text)
    row = torch.arange(rows, device=device)[:, None].expand(rows, columns).reshape(1, -1)
    column = torch.arange(columns, device=device)[None].expand(rows, columns).reshape(1, -1)
    cells = row.shape[1]
    text_ids = torch.stack([text, zero, zero], dim=-1)
    image_ids = torch.stack(
        [length.expand(-1, cells), row.expand(batch, -1), column.expand(batch, -1)], dim=-1
    )
    return rope._get_freqs_cis(text_ids), rope._get_freqs_cis(image_ids)
