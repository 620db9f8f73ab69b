.section .rodata
.balign 64
.hidden jitnorm_cubin
.globl jitnorm_cubin
jitnorm_cubin:
.incbin "kernel.cubin"
.section .note.GNU-stack,"",%progbits
