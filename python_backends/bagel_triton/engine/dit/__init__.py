"""The denoising stage."""
