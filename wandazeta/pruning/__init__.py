"""Plain torch."""
