"""The commands hcmen-export and hcmen-compile."""
