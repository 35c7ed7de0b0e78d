"""The version, alone in a file so that building a wheel does not import torch."""

__version__ = "0.1.0"
