"""GPU kernels in Triton. A candidate imports its kernel when it is first called: only a GPU needs Triton."""
