"""KL divergences in torch that do not go negative, infinite or NaN."""
