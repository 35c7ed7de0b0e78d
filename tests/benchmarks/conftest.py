"""Benchmarks are no package of the project: they are found at its root."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
