"""What plugs jitnorm into other projects, a module each.

A module has the name of the project that it adapts to; inside it, `import vllm` is still the project.
"""
