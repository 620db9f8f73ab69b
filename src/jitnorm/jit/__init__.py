"""The build engine.

What to build (spec), with what (toolchain), building it (build), keeping it (cache), and loading it (load). Arrows
point from load to build to cache, toolchain and spec; nothing here knows an operator.
"""
