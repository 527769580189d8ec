"""Records of one alignment each, from a line of JSON to a balanced, packed global batch."""
