"""What remains of a network outside JAX: NumPy is all this room imports."""
