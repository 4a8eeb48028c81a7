"""What the families of optimizers share: how curvature is seen, what is kept of it, and what is solved with it.

Each imports from those above it alone:

- ``linalg``: damped inverses and decompositions that do not fail; ``communication``: what ranks exchange;
- ``spectra``: what eigenvalues say while training;
- ``layers/``: one adapter a layer type, and what a backward pass leaves of a layer;
- ``approximations``: the life of a layer's block, and the diagonal ones; ``samples``: gradients of single examples;
- ``probe``: whose gradient is whose, judged; ``second_order``: layers with cheap second derivatives;
- ``recorder/``: the only package that touches hooks, what flows through layers and what the model was called with;
- ``losses``: what a loss's own graph states of it; ``quadratic``: the loss's quadratic model on a few directions;
- ``rearranged/``: the leading Kronecker pairs of a block; ``kronecker/``: Kronecker approximations, a file each;
- ``damping``: damping that follows how far the quadratic model can be trusted.
"""
