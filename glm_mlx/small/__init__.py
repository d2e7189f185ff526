"""The small model that ships with the project: its corpus, training, export and evaluation."""

from pathlib import Path

SMALL_MODEL = Path(__file__).with_name("small.gguf")
