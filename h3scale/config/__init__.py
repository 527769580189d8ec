"""Strict models for what people write: recipes (YAML) and DeepSpeed JSON. No torch here."""
