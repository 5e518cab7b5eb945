"""Load teachers and other timm models, with their weights."""
