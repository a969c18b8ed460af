"""What a step will need, before any GPU is rented: `triton-sp plan`, and `explain(model, **batch)`."""
