"""Experts coded near the rate-distortion limit: water-filling, error feedback, a trellis, packing. Mathematics alone."""
