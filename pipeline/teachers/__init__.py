"""Teachers: frozen models, placed where their weights fit."""
