"""The loss, from this rank's logits or without any: heads, scores of tokens, and routers' auxiliary loss."""
