"""Megatron-LM's format ``torch``: one ``torch.save`` file per rank of a parallel layout."""
