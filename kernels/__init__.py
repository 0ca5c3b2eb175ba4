"""Kernels, one folder an op: the definition of correct (``reference.py``), the composition of library calls
(``library.py``) and our own C++, CUDA and Triton code side by side. Nothing here knows about modules."""
