"""Weights on disk: streamed safetensors, DeepSpeed shards, consolidation, verification, release."""
