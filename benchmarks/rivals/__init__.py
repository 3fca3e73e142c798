"""Other ways to store experts in fewer parameters, each written from its paper's description."""
