"""Integrations of jitnorm into other projects, one module for each."""
