"""The measured rates of a machine: benchmarks on its ranks, the fit, and the file that keeps them."""
