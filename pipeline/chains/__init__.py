"""Chains of stages behind one command."""
