"""Where examples come from: image and text files, downloads, other packages' copies, and what is made rather than read.

Pillow, torchvision, scikit-learn and SciPy take seconds to import: a builder imports its source when it reads.
"""
