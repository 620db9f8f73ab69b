"""Integrations of jitnorm into other projects, one module for each.

A module has the name of the project that it adapts to; inside it, `import vllm` is still the project.
"""
