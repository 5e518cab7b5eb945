"""The stages and what passes between them. Each command of the CLI has its Python twin here."""
