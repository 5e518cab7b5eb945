"""Output folders of stages: claimed before work starts, with provenance, configuration and log; resumed or refused."""
