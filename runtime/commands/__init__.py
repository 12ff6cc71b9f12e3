"""The commands hcmen-run and hcmen-doctor."""
