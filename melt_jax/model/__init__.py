"""The model: pure functions and Flax modules of arrays and a frozen config."""
