"""Build kernels on first use, keep them on disk, and load them. Nothing here depends on an operator.

Each module imports only modules below it in this list:

    load         keep the modules of the kernels that this process has loaded
    find         find a kernel in the caches, fetch or build it, and open its library
    remote       fetch entries from a remote cache, and push entries to it
    build        run ninja and the compilers, and check their output
    archive      pack entries into one file, and add the entries of such a file to a cache
    launcher     make the functions of a CUDA kernel from its cubin
    library      check and load a shared library, from bytes that were verified
    toolchain    find the compilers, and ask them for their versions
    cleanup      remove what builds left behind
    locations    decide which caches this process uses
    cache        find, publish and quarantine entries
    entry        a cache entry: one compiled kernel on disk
    spec         what to build: source, ninja file and their key
    folder       access a folder that other users may have changed
    files        lock and write files
    log          the package's logger
    nvrtc        compile CUDA sources in this process
    environment  read environment variables and installed versions
"""
