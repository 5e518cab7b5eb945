"""What a cache would cost, before it is made."""
