"""Runs as models of EleutherAI's lm-evaluation-harness (extra ``eval``)."""
