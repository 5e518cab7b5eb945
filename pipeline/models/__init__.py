"""Models of timm, of transformers and of the user's own: names, building, weights, saving."""
