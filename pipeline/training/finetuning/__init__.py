"""Fine-tuning with labels: its batches, its views, its losses."""
