"""How architectures are told apart that are not timm's; nothing here waits for torch."""

# A model type of transformers, such as hf:dinov2.
HF = "hf:"
# A class of the user's own, such as own:Net. Its code is never run because a cache or a run names it.
OWN = "own:"
