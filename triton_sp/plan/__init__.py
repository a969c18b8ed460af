"""Who owns which tokens and heads of a batch, and why. Computed on every rank from what all ranks know."""
