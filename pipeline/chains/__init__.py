"""Chains of stages that run as one command."""
