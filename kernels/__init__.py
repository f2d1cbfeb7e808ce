"""Formats and their kernels, one folder each; import them as ``sparsekit.kernels``."""

if __name__ != "sparsekit.kernels":
    # Run from the source folder, other packages' `import kernels` (transformers looks for one of that name) ends here:
    # it is empty, because a second copy of what is inside would register every operator twice.
    __path__: list[str] = []
