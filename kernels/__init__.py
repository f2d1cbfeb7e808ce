"""Formats and their kernels, one folder each; import them as ``sparsekit.kernels``."""

if __name__ != "sparsekit.kernels":  # a second copy would register every operator twice
    raise ImportError("Expected 'import sparsekit.kernels', got a plain 'import kernels' from the source folder")
