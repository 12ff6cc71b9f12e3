"""What everything else stands on: needs NumPy and click alone, and imports nothing else of hcmen."""

__all__: list[str] = []
