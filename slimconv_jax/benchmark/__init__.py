"""How fast architectures are here, and what they need on devices that are not here."""
