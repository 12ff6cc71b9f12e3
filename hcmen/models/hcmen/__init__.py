"""HCMEN: CNN and Mamba over text, audio and vision, any of which may be missing."""
