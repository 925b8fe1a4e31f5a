"""Kernels in C++ for CPUs (src/, one topic a file): compiled once by this machine's compiler, called through a C ABI.

An op's file says `native(op)`, which registers its candidate. Alone it is called like any other kernel; in an engine
whole runs of such nodes are one native call (runtime/worker/native.py).
"""
