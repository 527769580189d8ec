"""What a fused model is made of: families, tensor names, router and experts."""
