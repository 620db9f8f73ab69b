"""The build engine: what to build (spec), with what (toolchain), building it (build), keeping it (cache), loading it (load)."""
