"""GPU kernels, by Pallas for Hopper; they import JAX only. `reference` says what each computes, the rest is speed."""
