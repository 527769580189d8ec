"""h3scale: one model of a helpful, a harmless and an honest one (H3Fusion and RESM), trained at scale and released."""

__version__ = "0.1.0"
