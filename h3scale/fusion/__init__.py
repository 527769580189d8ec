"""Dense aligned models to one mixture-of-experts model: plan, execute, router start."""
