"""The training engine: the only door to deepspeed.initialize, the losses and the loop."""
