"""Frames as PNG files: grey or RGB, eight bits, from a tensor with values in [0, 1]."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor

from vdqc.base.diagnostics import InputError


def encode(image: Tensor) -> bytes:
    """PNG bytes of ``image`` float[C, H, W], C 1 (grey) or 3 (RGB), clamped to [0, 1].

    Source: PNG specification, third edition, sections 5 and 9 (filter type 0 on every row).
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise InputError(f"expected an image [1 or 3, H, W], got {list(image.shape)}")
    channels, height, width = image.shape
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    rows = pixels.permute(1, 2, 0).reshape(height, width * channels).cpu()
    filtered = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), rows], dim=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    data = zlib.compress(filtered.numpy().tobytes(), 9)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)


def data_uri(image: Tensor) -> str:
    """``image`` as the ``src`` of an ``img`` element."""
    return "data:image/png;base64," + base64.b64encode(encode(image)).decode()


def strip(video: Tensor, columns: int) -> Tensor:
    """``columns`` frames of float[C, F, H, W], evenly spread, side by side: [C, H, W']."""
    frames = video.shape[1]
    chosen = torch.linspace(0, frames - 1, min(columns, frames)).round().long()
    padded = torch.nn.functional.pad(video[:, chosen], (0, 1))
    return padded.permute(0, 2, 1, 3).flatten(2)[..., :-1]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
