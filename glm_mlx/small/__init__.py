"""The small model that ships with the project: its corpus, training, export and evaluation."""
