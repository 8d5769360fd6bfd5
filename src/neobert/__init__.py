"""NeoBERT: raw text to a trained, evaluated, shippable text encoder. The tour of the house: docs/architecture.md."""

__version__ = "0.1.0"
