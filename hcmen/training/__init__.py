"""How a model is trained, kept and scored: hcmen-train."""
