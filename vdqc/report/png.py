"""Frames as PNG files: grey or RGB, eight bits, from a tensor with values in [0, 1]; also loops.

Source: PNG specification, third edition, sections 5, 9 (filters) and 11.3.2 (animation chunks).
"""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor

from vdqc.base.diagnostics import InputError


def encode(image: Tensor) -> bytes:
    """PNG bytes of ``image`` float[C, H, W], C 1 (grey) or 3 (RGB), clamped to [0, 1]."""
    body = _chunk(b"IDAT", _pixels(image))
    return _file(_header(image), body)


def encode_loop(video: Tensor, frames_per_second: int) -> bytes:
    """An animated PNG of ``video`` float[C, F, H, W] that repeats without end.

    A viewer without animation shows the first frame.
    """
    chunks = [_chunk(b"acTL", struct.pack(">II", video.shape[1], 0))]
    number = 0
    for index in range(video.shape[1]):
        frame = video[:, index]
        height, width = frame.shape[1:]
        control = (number, width, height, 0, 0, 1, frames_per_second, 0, 0)
        chunks.append(_chunk(b"fcTL", struct.pack(">IIIIIHHBB", *control)))
        number += 1
        if index == 0:
            chunks.append(_chunk(b"IDAT", _pixels(frame)))
        else:
            chunks.append(_chunk(b"fdAT", struct.pack(">I", number) + _pixels(frame)))
            number += 1
    return _file(_header(video[:, 0]), *chunks)


def data_uri(image: Tensor) -> str:
    """``image`` as the ``src`` of an ``img`` element."""
    return as_uri(encode(image))


def as_uri(data: bytes) -> str:
    """PNG bytes as the ``src`` of an ``img`` element."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def strip(video: Tensor, columns: int) -> Tensor:
    """``columns`` frames of float[C, F, H, W], evenly spread, side by side: [C, H, W']."""
    frames = video.shape[1]
    chosen = torch.linspace(0, frames - 1, min(columns, frames)).round().long()
    padded = torch.nn.functional.pad(video[:, chosen], (0, 1))
    return padded.permute(0, 2, 1, 3).flatten(2)[..., :-1]


def _header(image: Tensor) -> bytes:
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise InputError(f"expected an image [1 or 3, H, W], got {list(image.shape)}")
    channels, height, width = image.shape
    fields = (width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    return _chunk(b"IHDR", struct.pack(">IIBBBBB", *fields))


def _pixels(image: Tensor) -> bytes:
    """Rows under whichever of two filters packs better: none, or the difference to the left."""
    channels, height, width = image.shape
    pixels = (image.detach().float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    rows = pixels.permute(1, 2, 0).reshape(height, width * channels).cpu()
    left = rows.clone()
    left[:, channels:] -= rows[:, :-channels]
    packed = []
    for kind, filtered in ((0, rows), (1, left)):
        named = torch.cat([torch.full((height, 1), kind, dtype=torch.uint8), filtered], dim=1)
        packed.append(zlib.compress(named.numpy().tobytes(), 9))
    return min(packed, key=len)


def _file(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
