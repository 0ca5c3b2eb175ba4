"""How :func:`fastres.fuse` works: share, trace, match, rewrite.

``sharing`` makes a twin of the network with the same parameters, ``tracing`` records its forward as a graph,
``effects`` finds out which in-place operations may be moved, ``patterns`` recognises the pieces, ``rewriting`` joins
them into fused layers (``runtime``), and ``program`` turns the graph into the twin's new forward.
"""
