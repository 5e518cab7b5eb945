"""The training loop with the folder of a run, and what it trains: refining, distilling and finetuning."""
