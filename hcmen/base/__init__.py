"""What every other room stands on: errors, files, clips, bundles and the kernel library. NumPy and click alone."""
