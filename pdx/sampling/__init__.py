"""From logits to tokens: what a request asks, filters, the sampler, and what model files recommend."""
